{{/*
(list $ name): a pool of workers as YAML: its own values over workerDefaults, with

  fullname   of its objects
  fetch      whether its model is fetched into the cache
  model.path what the worker loads; another one for each source and revision, so that a folder that
             is there never holds something older. Empty: the model inside the image
  model.name what callers name it
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
{{- $_ := set $pool "fetch" (and (not (empty $source)) (not $folder)) -}}
{{- $_ := set $pool.model "path" $path -}}
{{- $_ := set $pool.model "name" (default (ternary (base $path) "atelier" (not (empty $path))) $pool.model.name) -}}
{{- toYaml $pool -}}
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
