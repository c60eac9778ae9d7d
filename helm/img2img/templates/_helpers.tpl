{{/* Names and labels. */}}
{{- define "img2img.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- /* Leaves room for the longest suffix, -worker-<pool>. */ -}}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* (list $ component): the labels that select the pods of a component; they must never change. */}}
{{- define "img2img.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* (list $ component): the labels of every object. */}}
{{- define "img2img.labels" -}}
{{- $root := index . 0 -}}
{{- $ours := include "img2img.selector" . | fromYaml -}}
{{- $_ := set $ours "app.kubernetes.io/version" $root.Chart.AppVersion -}}
{{- $_ := set $ours "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $ours "app.kubernetes.io/part-of" "img2img" -}}
{{- $_ := set $ours "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_") -}}
{{ merge $ours $root.Values.commonLabels | toYaml }}
{{- end -}}

{{/*
(dict root selector on): the labels of pods. They do not have the versions of chart and service: a new
version of the chart alone restarts no pod.
*/}}
{{- define "img2img.podLabels" -}}
{{- $ours := .selector | fromYaml -}}
{{- $_ := set $ours "app.kubernetes.io/part-of" "img2img" -}}
{{ merge $ours (default dict .on.podLabels) .root.Values.podLabels .root.Values.commonLabels | toYaml }}
{{- end -}}

{{/* (list $ annotations…): the annotations of an object, with the key; the first map takes precedence. */}}
{{- define "img2img.annotations" -}}
{{- $all := dict -}}
{{- range rest . -}}
{{- $all = merge $all (default dict .) -}}
{{- end -}}
{{- with merge $all (first .).Values.commonAnnotations -}}
annotations: {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* (list $ "full"|"slim"): the image; api and gateway need no torch. */}}
{{- define "img2img.image" -}}
{{- $image := (index . 0).Values.image -}}
{{- $slim := eq (index . 1) "slim" -}}
{{- $tag := default (index . 0).Chart.AppVersion $image.tag -}}
{{- $digest := ternary $image.slimDigest $image.digest $slim -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repository }}
{{- if $digest }}@{{ $digest }}{{ else }}:{{ $tag }}{{ if $slim }}{{ $image.slimSuffix }}{{ end }}{{ end }}
{{- end -}}

{{/* (list secret key): the source of an environment variable. */}}
{{- define "img2img.fromSecret" -}}
valueFrom:
  secretKeyRef:
    name: {{ index . 0 }}
    key: {{ index . 1 }}
{{- end -}}

{{/* Names of Secrets: the existing one or the one that this release creates. */}}
{{- define "img2img.s3Secret" -}}
{{- default (printf "%s-s3" (include "img2img.fullname" .)) .Values.s3.existingSecret -}}
{{- end -}}

{{/* (dict root component): the service account of a role. */}}
{{- define "img2img.serviceAccountName" -}}
{{- $on := default (dict "create" true) (index .root.Values.serviceAccounts .component) -}}
{{- $own := printf "%s-%s" (include "img2img.fullname" .root) .component -}}
{{- default (ternary $own "default" $on.create) $on.name -}}
{{- end -}}

{{- define "img2img.apiKeysSecret" -}}
{{- default (printf "%s-api-keys" (include "img2img.fullname" .)) .Values.apiKeys.existingSecret -}}
{{- end -}}

{{- define "img2img.apiCaSecret" -}}
{{- $own := ternary .Values.api.tls.existingSecret "" (default false .Values.api.enabled) -}}
{{- default $own .Values.gateway.apiCaSecret -}}
{{- end -}}

{{/* Addresses. */}}
{{- define "img2img.natsUrl" -}}
{{- if .Values.quickstart.nats.enabled -}}
nats://{{ include "img2img.fullname" . }}-nats:4222
{{- else -}}
{{ .Values.nats.url }}
{{- end -}}
{{- end -}}

{{- define "img2img.apiMetrics" -}}
{{- $root := index . 0 -}}
{{- $own := printf "http://%s-api-headless.%s.svc:9090/metrics" (include "img2img.fullname" $root) $root.Release.Namespace -}}
{{- default (ternary $own "" $root.Values.api.enabled) (index . 1).apiMetricsUrl -}}
{{- end -}}

{{- define "img2img.s3Url" -}}
{{- if .Values.quickstart.s3.enabled -}}
http://{{ include "img2img.fullname" . }}-s3:8333
{{- else -}}
{{ .Values.s3.endpointUrl }}
{{- end -}}
{{- end -}}

{{/* The headless Service: the gateway's gRPC client sees every api pod and balances its calls. */}}
{{- define "img2img.apiAddress" -}}
{{- $own := printf "%s-api-headless:50051" (include "img2img.fullname" .) -}}
{{- default $own .Values.gateway.apiAddress -}}
{{- end -}}

{{- define "img2img.publicBaseUrl" -}}
{{- $ingress := .Values.gateway.ingress -}}
{{- if .Values.publicBaseUrl -}}
{{ .Values.publicBaseUrl }}
{{- else if and .Values.gateway.enabled $ingress.enabled -}}
{{ ternary "https" "http" (not (empty $ingress.tlsSecret)) }}://{{ $ingress.host }}
{{- end -}}
{{- end -}}

{{/* A number or boolean as text of an environment variable: 100000000, not 1e+08. */}}
{{- define "img2img.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}
{{ int64 . }}
{{- else -}}
{{ . }}
{{- end -}}
{{- end -}}

{{/* Text as one token of a NATS subject: other bytes than [A-Za-z0-9_-] become =XX. */}}
{{- define "img2img.token" -}}
{{- range splitList "" . -}}
{{- if regexMatch "^[A-Za-z0-9_-]$" . -}}
{{ . }}
{{- else -}}
={{ printf "% X" . | replace " " "=" }}
{{- end -}}
{{- end -}}
{{- end -}}
