{{/*
Completes .Values, so that templates can read every value after a null took its default out. Every template
begins with it, because Helm renders templates in no order that can be relied on; the first one does the work.
*/}}
{{- define "img2img.setup" -}}
{{- if not (hasKey .Values "complete") -}}
{{- range $name, $group := .Values -}}
{{- /* In a pool, a null takes out a value of workerDefaults; see img2img.pool. */ -}}
{{- if ne $name "workers" -}}
{{- include "img2img.withoutNulls" $group -}}
{{- end -}}
{{- end -}}
{{- include "img2img.complete" (list .Values (include "img2img.empty" . | fromYaml)) -}}
{{- $_ := set .Values "complete" true -}}
{{- end -}}
{{- end -}}

{{/* Removes the nulls in a map and in the maps in it. */}}
{{- define "img2img.withoutNulls" -}}
{{- if kindIs "map" . -}}
{{- $map := . -}}
{{- range $name, $value := . -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $map $name -}}
{{- else -}}
{{- include "img2img.withoutNulls" $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (list values empty): sets what the values lack. */}}
{{- define "img2img.complete" -}}
{{- $values := index . 0 -}}
{{- range $name, $empty := index . 1 -}}
{{- $value := index $values $name -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := set $values $name $empty -}}
{{- else if and (kindIs "map" $value) (kindIs "map" $empty) -}}
{{- include "img2img.complete" (list $value $empty) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (list defaults own): sets the own values over the defaults; a null removes one. */}}
{{- define "img2img.overlay" -}}
{{- $values := index . 0 -}}
{{- range $name, $value := index . 1 -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $values $name -}}
{{- else if and (kindIs "map" $value) (kindIs "map" (index $values $name)) -}}
{{- include "img2img.overlay" (list (index $values $name) $value) -}}
{{- else -}}
{{- $_ := set $values $name $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
