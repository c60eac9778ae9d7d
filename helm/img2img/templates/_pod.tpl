{{/*
The parts that all pods share. A dict of
  root
  component  api, gateway, worker …
  selector   labels that select the pods, as YAML
  on         values with priorityClassName, topologySpread, nodeSelector, tolerations, affinity
  class      serving or workers
  grace      seconds from asking to killing
*/}}
{{- define "img2img.pod" -}}
serviceAccountName: {{ include "img2img.serviceAccountName" . }}
automountServiceAccountToken: {{ dig .component "automountToken" false .root.Values.serviceAccounts }}
# Kubernetes would set IMG2IMG_API_SERVICE_HOST and the like, which are not settings of the service.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  {{- with .root.Values.user }}
  runAsUser: {{ int64 . }}
  runAsGroup: {{ int64 . }}
  fsGroup: {{ int64 . }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
terminationGracePeriodSeconds: {{ .grace }}
{{- with include "img2img.priorityClass" . }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .root.Values.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .root.Values.dnsConfig }}
dnsConfig: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .on.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .on.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .on.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $selector := .selector }}
{{- with .on.topologySpread }}
topologySpreadConstraints:
{{- range $key, $otherwise := . }}
{{- if $otherwise }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: {{ $otherwise }}
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels: {{- $selector | nindent 8 }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "img2img.priorityClass" -}}
{{- if .on.priorityClassName -}}
{{ .on.priorityClassName }}
{{- else if .root.Values.priorityClasses.create -}}
{{ include "img2img.fullname" .root }}-{{ .class }}
{{- end -}}
{{- end -}}

{{/* The container's security context; it writes to volumes only. */}}
{{- define "img2img.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/*
Seconds that Kubernetes waits for a pod: until clients no longer send it requests, its drain, and 20 more
for the last uploads and the end of the connections.
*/}}
{{- define "img2img.grace" -}}
{{- add (default 0 .preStopSeconds | int64) (.drainSeconds | float64 | ceil | int64) 20 -}}
{{- end -}}

{{/*
(dict root on): annotations of pods. The checksum changes with the settings and with the Secrets that the
chart creates, so that pods restart; it does not depend on the version of the chart.
*/}}
{{- define "img2img.podAnnotations" -}}
{{- $secrets := list .root.Values.s3.accessKey .root.Values.s3.secretKey .root.Values.quickstart.seed -}}
{{- $secrets = concat $secrets (list .root.Values.quickstart.nats.password .root.Values.quickstart.s3.accessKey .root.Values.quickstart.s3.secretKey) -}}
{{- $ours := dict "checksum/settings" (list (include "img2img.settings" .root) $secrets | toJson | sha256sum) -}}
{{- with (default dict .on.model).file -}}
{{- $_ := set $ours "checksum/catalogue" (sha256sum .) -}}
{{- end }}
{{ merge $ours (default dict .on.podAnnotations) .root.Values.podAnnotations | toYaml }}
{{- end -}}

{{/* The liveness probe of all roles. */}}
{{- define "img2img.livez" -}}
httpGet:
  path: /livez
  port: metrics
timeoutSeconds: 5
{{- end -}}

{{/* Keeps serving until endpoints and load balancers no longer list the pod. */}}
{{- define "img2img.preStop" -}}
{{- if gt (int64 .preStopSeconds) 0 }}
lifecycle:
  preStop:
    sleep:
      seconds: {{ int64 .preStopSeconds }}
{{- end }}
{{- end -}}

{{/* (list $ on key): a list of all roles, then that of one role, as YAML; nothing if both are empty. */}}
{{- define "img2img.both" -}}
{{- $key := index . 2 -}}
{{- with concat (index (index . 0).Values $key) (default list (index (index . 1) $key)) -}}
{{ toYaml . }}
{{- end -}}
{{- end -}}

{{/* Volumes and mounts of all roles. */}}
{{- define "img2img.commonVolumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 2Gi
{{- with .Values.trustBundle.configMap }}
- name: trust
  configMap:
    name: {{ . }}
{{- end }}
{{- end -}}

{{- define "img2img.commonMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .Values.trustBundle.configMap }}
- name: trust
  mountPath: /etc/img2img/trust
  readOnly: true
{{- end }}
{{- end -}}

{{- define "img2img.natsVolume" -}}
{{- with .Values.nats }}
{{- range $name, $secret := dict "nats" .credsSecret "nats-ca" .caSecret "nats-cert" .certSecret }}
{{- if $secret }}
- name: {{ $name }}
  secret:
    secretName: {{ $secret }}
    defaultMode: 0440
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "img2img.natsMount" -}}
{{- with .Values.nats }}
{{- range $name, $secret := dict "nats" .credsSecret "nats-ca" .caSecret "nats-cert" .certSecret }}
{{- if $secret }}
- name: {{ $name }}
  mountPath: /etc/img2img/{{ $name }}
  readOnly: true
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The resources of a container, with the key; an empty part is left out. */}}
{{- define "img2img.resources" -}}
{{- $kept := dict -}}
{{- range $part, $amounts := default dict . -}}
{{- with $amounts -}}
{{- $_ := set $kept $part . -}}
{{- end -}}
{{- end -}}
{{- with $kept -}}
resources: {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}
