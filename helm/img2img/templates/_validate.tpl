{{/* Checks that a schema cannot make. Reports all mistakes at once. */}}
{{- define "img2img.validate" -}}
{{- $mistakes := list -}}
{{- $v := .Values -}}
{{- $needsBus := or $v.api.enabled $v.workers -}}
{{- if and $needsBus (not (or $v.nats.url $v.nats.existingSecret $v.quickstart.nats.enabled)) -}}
{{- $mistakes = append $mistakes "nats.url or nats.existingSecret is missing (or set quickstart.nats.enabled)" -}}
{{- end -}}
{{- if and $v.nats.url $v.nats.existingSecret -}}
{{- $mistakes = append $mistakes "nats.url and nats.existingSecret exclude each other" -}}
{{- end -}}
{{- if and (or $v.gateway.enabled $v.workers) (not (or $v.s3.endpointUrl $v.quickstart.s3.enabled)) -}}
{{- $mistakes = append $mistakes "s3.endpointUrl is missing (or set quickstart.s3.enabled)" -}}
{{- end -}}
{{- $s3Keys := and $v.s3.accessKey $v.s3.secretKey -}}
{{- if and (or $v.gateway.enabled $v.workers) (not (or $v.s3.existingSecret $s3Keys $v.s3.identity $v.quickstart.s3.enabled)) -}}
{{- $mistakes = append $mistakes "s3.existingSecret is missing (or s3.identity, or s3.accessKey and s3.secretKey)" -}}
{{- end -}}
{{- if and $v.s3.identity (or $v.s3.existingSecret $v.s3.accessKey $v.s3.secretKey $v.quickstart.s3.enabled) -}}
{{- $mistakes = append $mistakes "s3.identity excludes s3.existingSecret, s3.accessKey and quickstart.s3.enabled" -}}
{{- end -}}
{{- if and $v.s3.sessionTokenKey (not $v.s3.existingSecret) -}}
{{- $mistakes = append $mistakes "s3.sessionTokenKey is an entry of s3.existingSecret, which is missing" -}}
{{- end -}}
{{- if and $v.nats.authSecret (not $v.nats.url) -}}
{{- $mistakes = append $mistakes "nats.authSecret belongs to nats.url: in nats.existingSecret the address holds user and password" -}}
{{- end -}}
{{- if and $v.s3.existingSecret (or $v.s3.accessKey $v.s3.secretKey) -}}
{{- $mistakes = append $mistakes "s3.existingSecret and s3.accessKey exclude each other" -}}
{{- end -}}
{{- if and $v.quickstart.s3.enabled (or $v.s3.existingSecret $v.s3.accessKey $v.s3.endpointUrl) -}}
{{- $mistakes = append $mistakes "quickstart.s3.enabled brings its own address and keys: leave those in s3 empty" -}}
{{- end -}}
{{- if and $v.quickstart.nats.enabled (or $v.nats.url $v.nats.existingSecret) -}}
{{- $mistakes = append $mistakes "quickstart.nats.enabled brings its own address: leave that in nats empty" -}}
{{- end -}}
{{- if and $v.quickstart.nats.enabled (ne (int $v.nats.replicas) 1) -}}
{{- $mistakes = append $mistakes "quickstart.nats.enabled is one server: nats.replicas must be 1" -}}
{{- end -}}
{{- $keys := or $v.apiKeys.existingSecret $v.apiKeys.tenants $v.quickstart.apiKey.enabled -}}
{{- if and $v.api.enabled (not $keys) -}}
{{- $mistakes = append $mistakes "apiKeys.existingSecret or apiKeys.tenants is missing (or set quickstart.apiKey.enabled)" -}}
{{- end -}}
{{- if and $v.apiKeys.existingSecret (or $v.apiKeys.tenants $v.quickstart.apiKey.enabled) -}}
{{- $mistakes = append $mistakes "apiKeys.existingSecret excludes apiKeys.tenants and quickstart.apiKey" -}}
{{- end -}}
{{- if and $v.api.tls.clientCaSecret (not $v.api.tls.existingSecret) -}}
{{- $mistakes = append $mistakes "api.tls.clientCaSecret needs api.tls.existingSecret" -}}
{{- end -}}
{{- if and $v.gateway.enabled $v.api.enabled $v.api.tls.clientCaSecret (not $v.gateway.apiCertSecret) -}}
{{- $mistakes = append $mistakes "gateway.apiCertSecret is missing: the api refuses clients without a certificate (api.tls.clientCaSecret)" -}}
{{- end -}}
{{- if and $v.gateway.enabled (not $v.api.enabled) (not $v.gateway.apiAddress) -}}
{{- $mistakes = append $mistakes "gateway.apiAddress is missing: this release has no api of its own" -}}
{{- end -}}
{{- range $role, $on := dict "api" $v.api "gateway" $v.gateway -}}
{{- $service := $on.service -}}
{{- if and (eq $service.type "ClusterIP") (or $service.nodePort $service.externalTrafficPolicy) -}}
{{- $mistakes = append $mistakes (printf "%s.service: nodePort and externalTrafficPolicy belong to the types NodePort and LoadBalancer" $role) -}}
{{- end -}}
{{- if and (ne $service.type "LoadBalancer") (or $service.loadBalancerClass $service.loadBalancerSourceRanges) -}}
{{- $mistakes = append $mistakes (printf "%s.service: loadBalancerClass and loadBalancerSourceRanges belong to the type LoadBalancer" $role) -}}
{{- end -}}
{{- if and $on.ingress.enabled (not $on.ingress.host) -}}
{{- $mistakes = append $mistakes (printf "%s.ingress.host is missing" $role) -}}
{{- end -}}
{{- if and $on.autoscaling.enabled (not (or $on.autoscaling.targetCpuPercent $on.autoscaling.metrics)) -}}
{{- $mistakes = append $mistakes (printf "%s.autoscaling has no metric: set targetCpuPercent or metrics" $role) -}}
{{- end -}}
{{- if lt (int $on.autoscaling.maxReplicas) (int $on.autoscaling.minReplicas) -}}
{{- $mistakes = append $mistakes (printf "%s.autoscaling.maxReplicas is below minReplicas" $role) -}}
{{- end -}}
{{- end -}}
{{- range $name, $_ := $v.workers -}}
{{- $pool := include "img2img.pool" (list $ $name) | fromYaml -}}
{{- $auto := $pool.autoscaling -}}
{{- $cache := $pool.modelCache.type -}}
{{- if and $pool.fetches (has $cache (list "none" "image")) -}}
{{- $mistakes = append $mistakes (printf "workers.%s: %s must be fetched, so modelCache.type must be emptyDir, persistentVolumeClaim or hostPath" $name (first $pool.fetches).source) -}}
{{- end -}}
{{- if and $pool.model.catalogue $pool.model.source -}}
{{- $mistakes = append $mistakes (printf "workers.%s: model.source and model.catalogue cannot be used together" $name) -}}
{{- end -}}
{{- if ne (len $pool.model.names) (len (uniq $pool.model.names)) -}}
{{- $mistakes = append $mistakes (printf "workers.%s: two models of model.catalogue have the same name" $name) -}}
{{- end -}}
{{- range $pool.model.catalogue -}}
{{- if and (hasPrefix "/" (default "" .source)) (eq $cache "none") -}}
{{- $mistakes = append $mistakes (printf "workers.%s: %s needs a modelCache" $name .source) -}}
{{- end -}}
{{- end -}}
{{- if and (hasPrefix "/" $pool.model.source) (eq $cache "none") -}}
{{- $mistakes = append $mistakes (printf "workers.%s: %s needs a modelCache" $name $pool.model.source) -}}
{{- end -}}
{{- if and (eq $cache "image") (not $pool.modelCache.image) -}}
{{- $mistakes = append $mistakes (printf "workers.%s: modelCache.image is missing" $name) -}}
{{- end -}}
{{- if and $auto.enabled (eq $auto.trigger "jobs") (not (include "img2img.apiMetrics" (list $ $auto))) -}}
{{- $mistakes = append $mistakes (printf "workers.%s: without an api in this release, the trigger jobs needs autoscaling.apiMetricsUrl" $name) -}}
{{- end -}}
{{- if and $auto.enabled (eq $auto.trigger "prometheus") (not $auto.prometheusAddress) -}}
{{- $mistakes = append $mistakes (printf "workers.%s: the trigger prometheus needs autoscaling.prometheusAddress" $name) -}}
{{- end -}}
{{- if and $auto.enabled (eq $auto.trigger "none") (not $auto.triggers) -}}
{{- $mistakes = append $mistakes (printf "workers.%s: without a trigger of the chart, autoscaling.triggers must have one" $name) -}}
{{- end -}}
{{- if and $auto.authenticationRef (ne $auto.trigger "prometheus") -}}
{{- $mistakes = append $mistakes (printf "workers.%s: autoscaling.authenticationRef belongs to the trigger prometheus; an entry of triggers has its own" $name) -}}
{{- end -}}
{{- if lt (int $auto.maxReplicas) (int $auto.minReplicas) -}}
{{- $mistakes = append $mistakes (printf "workers.%s: autoscaling.maxReplicas is below minReplicas" $name) -}}
{{- end -}}
{{- end -}}
{{- if $mistakes -}}
{{- fail (printf "\n\nThe values do not fit together:\n  - %s\n" (join "\n  - " $mistakes)) -}}
{{- end -}}
{{- end -}}
