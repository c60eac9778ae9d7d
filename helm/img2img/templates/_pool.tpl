{{/*
(list $ name): a pool of workers as YAML: its own values over workerDefaults, with

  fullname   of its objects
  fetches     the models to fetch into the cache: source, path and revision of each
  model.path  what the worker loads; another one for each source and revision, so that a folder that
              is there never holds something older. Empty: the model inside the image
  model.name  what callers name it
  model.names the names of all models of the catalogue, or the one above
  model.file  the content of IMG2IMG_MODELS_FILE; empty without a catalogue
  model.copiesLoras  whether LoRAs of the bucket are copied into a volume of the pod
*/}}
{{- define "img2img.pool" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $own := deepCopy (default dict (index $root.Values.workers $name)) -}}
{{- $pool := deepCopy $root.Values.workerDefaults -}}
{{- include "img2img.overlay" (list $pool $own) -}}
{{- include "img2img.complete" (list $pool (include "img2img.empty" $root | fromYaml).workerDefaults) -}}
{{- $source := $pool.model.source -}}
{{- $folder := hasPrefix "/" $source -}}
{{- $path := $source -}}
{{- if and $source (not $folder) -}}
{{- $path = printf "/models/%s/%s" (printf "%s@%s" $source $pool.model.revision | sha256sum | trunc 8) (base $source) -}}
{{- end -}}
{{- $_ := set $pool "name" $name -}}
{{- $_ := set $pool "fullname" (printf "%s-worker-%s" (include "img2img.fullname" $root) $name) -}}
{{- $fetches := list -}}
{{- if and $source (not $folder) -}}
{{- $fetches = list (dict "source" $source "path" $path "revision" $pool.model.revision) -}}
{{- end -}}
{{- $_ := set $pool.model "path" $path -}}
{{- $_ := set $pool.model "name" (default (ternary (base $path) "atelier" (not (empty $path))) $pool.model.name) -}}
{{- $_ := set $pool.model "names" (list $pool.model.name) -}}
{{- $_ := set $pool.model "file" "" -}}
{{- $_ := set $pool.model "copiesLoras" false -}}
{{- if $pool.model.catalogue -}}
{{- $models := list -}}
{{- $names := list -}}
{{- range $entry := $pool.model.catalogue -}}
{{- $model := deepCopy $entry -}}
{{- $from := default "" $entry.source -}}
{{- $bare := regexReplaceAll "@.*$" $from "" -}}
{{- $isHub := not (or (empty $from) (hasPrefix "/" $from) (hasPrefix "s3://" $from)) -}}
{{- $own := ternary $bare (ternary "atelier" (base $bare | trimSuffix ".safetensors") (empty $from)) $isHub -}}
{{- $_ := set $model "name" (default $own $entry.name) -}}
{{- if and $from (not (hasPrefix "/" $from)) -}}
{{- $to := printf "/models/%s/%s" ($from | sha256sum | trunc 8) (base $bare) -}}
{{- $_ := set $model "source" $to -}}
{{- $fetches = append $fetches (dict "source" $from "path" $to "revision" "") -}}
{{- end -}}
{{- if and $entry.lora_s3_prefix (not $entry.lora_dir) -}}
{{- $_ := set $model "lora_dir" (printf "/loras/%s" (trimSuffix "/" $entry.lora_s3_prefix)) -}}
{{- $_ := set $pool.model "copiesLoras" true -}}
{{- end -}}
{{- $models = append $models $model -}}
{{- $names = append $names $model.name -}}
{{- end -}}
{{- $_ := set $pool.model "names" $names -}}
{{- $_ := set $pool.model "file" (dict "models" $models | toPrettyJson) -}}
{{- end -}}
{{- $_ := set $pool "fetches" $fetches -}}
{{- toYaml $pool -}}
{{- end -}}

{{/* The end of a matcher of Prometheus for the models of a pool. */}}
{{- define "img2img.modelMatch" -}}
{{- if not .model.file -}}
={{ .model.name | quote }}
{{- else -}}
{{- $quoted := list -}}
{{- range .model.names -}}
{{- $quoted = append $quoted (regexQuoteMeta .) -}}
{{- end -}}
=~{{ join "|" $quoted | quote }}
{{- end -}}
{{- end -}}

{{/* (list $ pool): selector and labels of a pool. */}}
{{- define "img2img.poolSelector" -}}
{{ include "img2img.selector" (list (index . 0) "worker") }}
img2img/pool: {{ (index . 1).name }}
{{- end -}}

{{- define "img2img.poolLabels" -}}
{{ include "img2img.labels" (list (index . 0) "worker") }}
img2img/pool: {{ (index . 1).name }}
{{- end -}}

{{/* The volume of the models. */}}
{{- define "img2img.modelVolume" -}}
{{- $cache := .modelCache -}}
- name: models
{{- if eq $cache.type "emptyDir" }}
  emptyDir:
    sizeLimit: {{ $cache.size }}
{{- else if eq $cache.type "persistentVolumeClaim" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" .fullname) $cache.existingClaim }}
{{- else if eq $cache.type "hostPath" }}
  hostPath:
    path: {{ $cache.hostPath }}
    type: Directory
{{- else }}
  image:
    reference: {{ $cache.image }}
    pullPolicy: IfNotPresent
{{- end }}
{{- end -}}
