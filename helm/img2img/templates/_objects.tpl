{{/* Objects that several roles have. */}}

{{/* (dict root component): a service account, unless another one is used. */}}
{{- define "img2img.serviceAccount" -}}
{{- $on := index .root.Values.serviceAccounts .component -}}
{{- if $on.create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "img2img.serviceAccountName" . }}
  labels: {{- merge (include "img2img.labels" (list .root .component) | fromYaml) $on.labels | toYaml | nindent 4 }}
  {{- include "img2img.annotations" (list .root $on.annotations) | nindent 2 }}
automountServiceAccountToken: {{ $on.automountToken }}
{{- end -}}
{{- end -}}

{{/* (dict root component on): the autoscaler of a role, by CPU use and the operator's metrics. */}}
{{- define "img2img.autoscaler" -}}
{{- $name := printf "%s-%s" (include "img2img.fullname" .root) .component -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $name }}
  labels: {{- include "img2img.labels" (list .root .component) | nindent 4 }}
  {{- include "img2img.annotations" (list .root) | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ $name }}
  minReplicas: {{ int .on.minReplicas }}
  maxReplicas: {{ int .on.maxReplicas }}
  metrics:
    {{- with .on.targetCpuPercent }}
    - type: Resource
      resource:
        name: cpu
        target:
          type: Utilization
          averageUtilization: {{ int . }}
    {{- end }}
    {{- with .on.metrics }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .on.behavior }}
  behavior: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* The type of a Service and what belongs to it, without its ports. */}}
{{- define "img2img.serviceType" -}}
{{- with .type }}
type: {{ . }}
{{- end }}
{{- with .externalTrafficPolicy }}
externalTrafficPolicy: {{ . }}
{{- end }}
{{- with .loadBalancerClass }}
loadBalancerClass: {{ . }}
{{- end }}
{{- with .loadBalancerSourceRanges }}
loadBalancerSourceRanges: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* (dict root component): the ServiceMonitor of a role; it finds the Service with the label img2img/metrics. */}}
{{- define "img2img.serviceMonitor" -}}
{{- $on := .root.Values.monitoring.serviceMonitor -}}
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: {{ include "img2img.fullname" .root }}-{{ .component }}
  {{- with $on.namespace }}
  namespace: {{ . }}
  {{- end }}
  labels: {{- merge (include "img2img.labels" (list .root .component) | fromYaml) $on.labels | toYaml | nindent 4 }}
  {{- include "img2img.annotations" (list .root $on.annotations) | nindent 2 }}
spec:
  {{- if $on.namespace }}
  namespaceSelector:
    matchNames: [{{ .root.Release.Namespace }}]
  {{- end }}
  selector:
    matchLabels:
      {{- include "img2img.selector" (list .root .component) | nindent 6 }}
      img2img/metrics: "true"
  {{- if eq .component "worker" }}
  podTargetLabels: [img2img/pool]
  {{- end }}
  endpoints:
    - port: metrics
      {{- with $on.interval }}
      interval: {{ . }}
      {{- end }}
      {{- with $on.scrapeTimeout }}
      scrapeTimeout: {{ . }}
      {{- end }}
      {{- with $on.relabelings }}
      relabelings: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $on.metricRelabelings }}
      metricRelabelings: {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end -}}
