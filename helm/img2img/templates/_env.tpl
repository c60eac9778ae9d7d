{{/* The settings that all roles share, for the ConfigMap. Settings of the operator take precedence. */}}
{{- define "img2img.settings" -}}
{{- $ours := dict
  "IMG2IMG_METRICS_HOST" .Values.bindAddress
  "IMG2IMG_METRICS_PORT" "9090"
  "IMG2IMG_LOG_FORMAT" "json"
  "IMG2IMG_NATS_REPLICAS" (toString .Values.nats.replicas)
  "IMG2IMG_S3_ENDPOINT_URL" (include "img2img.s3Url" .)
  "IMG2IMG_S3_BUCKET" .Values.s3.bucket
-}}
{{- with .Values.s3.region -}}
{{- $_ := set $ours "IMG2IMG_S3_REGION" . -}}
{{- end -}}
{{- if not .Values.nats.existingSecret -}}
{{- $_ := set $ours "IMG2IMG_NATS_URL" (include "img2img.natsUrl" .) -}}
{{- end -}}
{{- with include "img2img.publicBaseUrl" . -}}
{{- $_ := set $ours "IMG2IMG_PUBLIC_BASE_URL" . -}}
{{- end -}}
{{- range $name, $value := merge (dict) .Values.settings .Values.env -}}
{{- $_ := set $ours $name (include "img2img.text" $value) -}}
{{- end -}}
{{- range $name, $value := $ours }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* (list $ on): the sources of a role's environment; later ones take precedence. */}}
{{- define "img2img.envFrom" -}}
- configMapRef:
    name: {{ include "img2img.fullname" (first .) }}-settings
{{- with include "img2img.both" (append . "extraEnvFrom") }}
{{ . }}
{{- end }}
{{- end -}}

{{/*
(dict root on where own): the environment of a container: its own variables as YAML, and those of
extraEnv. Kubernetes takes the last of two variables with one name and warns, or refuses the object.
*/}}
{{- define "img2img.env" -}}
{{- $extra := dict -}}
{{- range concat .root.Values.extraEnv .on.extraEnv -}}
{{- $_ := set $extra .name . -}}
{{- end -}}
{{- $all := list -}}
{{- $where := .where -}}
{{- range .own | fromYamlArray -}}
{{- if and (hasKey $extra .name) (hasPrefix "IMG2IMG_" .name) -}}
{{- fail (printf "\n\nextraEnv of %s: the chart sets %s from other values; change those\n" $where .name) -}}
{{- else if not (hasKey $extra .name) -}}
{{- $all = append $all . -}}
{{- end -}}
{{- end -}}
{{- range $name := keys $extra | sortAlpha -}}
{{- $all = append $all (index $extra $name) -}}
{{- end -}}
{{ toYaml $all }}
{{- end -}}

{{- define "img2img.commonEnv" -}}
- name: IMG2IMG_DRAIN_SECONDS
  value: {{ include "img2img.text" .on.drainSeconds | quote }}
- name: HOME
  value: /tmp
{{- with .root.Values.trustBundle }}
{{- if .configMap }}
- name: SSL_CERT_FILE
  value: /etc/img2img/trust/{{ .key }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "img2img.natsEnv" -}}
{{- if .Values.quickstart.nats.enabled }}
{{- $secret := printf "%s-nats" (include "img2img.fullname" .) }}
- name: IMG2IMG_NATS_USER
  {{- include "img2img.fromSecret" (list $secret "user") | nindent 2 }}
- name: IMG2IMG_NATS_PASSWORD
  {{- include "img2img.fromSecret" (list $secret "password") | nindent 2 }}
{{- end }}
{{- with .Values.nats }}
{{- if .existingSecret }}
- name: IMG2IMG_NATS_URL
  {{- include "img2img.fromSecret" (list .existingSecret .urlKey) | nindent 2 }}
{{- end }}
{{- if .authSecret }}
{{- if .tokenKey }}
- name: IMG2IMG_NATS_TOKEN
  {{- include "img2img.fromSecret" (list .authSecret .tokenKey) | nindent 2 }}
{{- else }}
- name: IMG2IMG_NATS_USER
  {{- include "img2img.fromSecret" (list .authSecret .userKey) | nindent 2 }}
- name: IMG2IMG_NATS_PASSWORD
  {{- include "img2img.fromSecret" (list .authSecret .passwordKey) | nindent 2 }}
{{- end }}
{{- end }}
{{- if .credsSecret }}
- name: IMG2IMG_NATS_CREDS_FILE
  value: /etc/img2img/nats/{{ .credsKey }}
{{- end }}
{{- if .caSecret }}
- name: IMG2IMG_NATS_CA_FILE
  value: /etc/img2img/nats-ca/{{ .caKey }}
{{- end }}
{{- if .certSecret }}
- name: IMG2IMG_NATS_CERT_FILE
  value: /etc/img2img/nats-cert/tls.crt
- name: IMG2IMG_NATS_KEY_FILE
  value: /etc/img2img/nats-cert/tls.key
{{- end }}
{{- end }}
{{- end -}}

{{- define "img2img.s3Env" -}}
{{- if not .Values.s3.identity -}}
{{- $secret := include "img2img.s3Secret" . -}}
- name: IMG2IMG_S3_ACCESS_KEY
  {{- include "img2img.fromSecret" (list $secret .Values.s3.accessKeyKey) | nindent 2 }}
- name: IMG2IMG_S3_SECRET_KEY
  {{- include "img2img.fromSecret" (list $secret .Values.s3.secretKeyKey) | nindent 2 }}
{{- with .Values.s3.sessionTokenKey }}
- name: IMG2IMG_S3_SESSION_TOKEN
  {{- include "img2img.fromSecret" (list $secret .) | nindent 2 }}
{{- end }}
{{- end -}}
{{- end -}}

{{- /* "true" if settings make the api read or write the bucket. */ -}}
{{- define "img2img.apiUsesBucket" -}}
{{- $inline := eq (toString (default false .Values.settings.IMG2IMG_BASE64_INLINE)) "true" -}}
{{- $uploads := not (has (toString (default 0 .Values.settings.IMG2IMG_UPLOAD_BYTES)) (list "0" "")) -}}
{{- if or $inline $uploads }}true{{ end -}}
{{- end -}}

{{- define "img2img.storageKeysEnv" -}}
{{- with .Values.storageKeys }}
{{- if .existingSecret }}
- name: IMG2IMG_STORAGE_KEYS
  {{- include "img2img.fromSecret" (list .existingSecret .key) | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
