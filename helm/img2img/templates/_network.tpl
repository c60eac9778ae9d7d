{{/* Rules that NetworkPolicies of several components have. */}}
{{- define "img2img.toDns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{- define "img2img.toNats" -}}
- ports:
    - {port: {{ ternary 4222 .Values.nats.port (default false .Values.quickstart.nats.enabled) }}, protocol: TCP}
{{- if .Values.quickstart.nats.enabled }}
  to:
    - podSelector:
        matchLabels: {{- include "img2img.selector" (list . "nats") | nindent 10 }}
{{- else }}{{ with .Values.networkPolicy.nats }}
  to: {{- toYaml . | nindent 4 }}
{{- end }}{{ end }}
{{- end -}}

{{- define "img2img.toS3" -}}
{{- $url := urlParse (include "img2img.s3Url" .) -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) -}}
- ports:
    - {port: {{ default (ternary 443 80 (eq $url.scheme "https")) $port }}, protocol: TCP}
{{- if .Values.quickstart.s3.enabled }}
  to:
    - podSelector:
        matchLabels: {{- include "img2img.selector" (list . "s3") | nindent 10 }}
{{- else }}{{ with .Values.networkPolicy.s3 }}
  to: {{- toYaml . | nindent 4 }}
{{- end }}{{ end }}
{{- end -}}

{{/* The addresses where pods with an identity get credentials: STS, EKS pod identity, EC2. */}}
{{- define "img2img.toIdentity" -}}
{{- if .Values.s3.identity }}
- ports:
    - {port: 443, protocol: TCP}
- ports:
    - {port: 80, protocol: TCP}
  to:
    - ipBlock: {cidr: 169.254.170.23/32}
    - ipBlock: {cidr: 169.254.169.254/32}
{{- end }}
{{- end -}}

{{- define "img2img.toPublic" -}}
{{- if .Values.networkPolicy.publicEgress }}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except: {{- toYaml .Values.networkPolicy.notPublic | nindent 10 }}
    - ipBlock:
        cidr: 2000::/3
{{- end }}
{{- end -}}

{{/* The collector of traces, at any address. */}}
{{- define "img2img.toCollector" -}}
{{- with .Values.settings.IMG2IMG_OTLP_ENDPOINT }}
- ports:
    - {port: {{ default 4317 (regexFind "[0-9]+$" (regexFind ":[0-9]+$" (urlParse .).host)) }}, protocol: TCP}
{{- end }}
{{- end -}}

{{- define "img2img.fromMetrics" -}}
{{- with .Values.networkPolicy.metrics }}
- ports:
    - {port: metrics, protocol: TCP}
  from: {{- toYaml . | nindent 4 }}
{{- end }}
{{- end -}}
