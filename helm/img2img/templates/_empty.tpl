{{/* What templates read for values that a null takes out. Written by `make gen`. */}}
{{- define "img2img.empty" -}}
api:
  affinity: {}
  autoscaling:
    behavior: {}
    enabled: false
    metrics: []
  deploymentAnnotations: {}
  enabled: false
  extraEnv: []
  extraEnvFrom: []
  extraVolumeMounts: []
  extraVolumes: []
  grpcRoute:
    enabled: false
    hostnames: []
    parentRefs: []
  ingress:
    annotations: {}
    className: ''
    enabled: false
    host: ''
    tlsSecret: ''
  initContainers: []
  networkPolicy:
    egress: []
    from: []
  nodeSelector: {}
  podAnnotations: {}
  podDisruptionBudget:
    enabled: false
  podLabels: {}
  priorityClassName: ''
  resources: {}
  service:
    annotations: {}
    externalTrafficPolicy: ''
    loadBalancerClass: ''
    loadBalancerSourceRanges: []
    type: ''
  sidecars: []
  tls:
    clientCaSecret: ''
    existingSecret: ''
  tolerations: []
  topologySpread: {}
apiKeys:
  existingSecret: ''
  tenants: {}
commonAnnotations: {}
commonLabels: {}
deploymentAnnotations: {}
dnsConfig: {}
env: {}
extraEnv: []
extraEnvFrom: []
extraVolumeMounts: []
extraVolumes: []
fullnameOverride: ''
gateway:
  affinity: {}
  apiAddress: ''
  apiCaSecret: ''
  apiCertSecret: ''
  autoscaling:
    behavior: {}
    enabled: false
    metrics: []
  deploymentAnnotations: {}
  enabled: false
  extraEnv: []
  extraEnvFrom: []
  extraVolumeMounts: []
  extraVolumes: []
  httpRoute:
    enabled: false
    hostnames: []
    parentRefs: []
  ingress:
    annotations: {}
    className: ''
    enabled: false
    host: ''
    tlsSecret: ''
  initContainers: []
  networkPolicy:
    egress: []
    from: []
  nodeSelector: {}
  podAnnotations: {}
  podDisruptionBudget:
    enabled: false
  podLabels: {}
  priorityClassName: ''
  resources: {}
  service:
    annotations: {}
    externalTrafficPolicy: ''
    loadBalancerClass: ''
    loadBalancerSourceRanges: []
    type: ''
  sidecars: []
  tolerations: []
  topologySpread: {}
image:
  digest: ''
  pullPolicy: ''
  pullSecrets: []
  registry: ''
  slimDigest: ''
  tag: ''
initContainers: []
monitoring:
  dashboard:
    annotations: {}
    enabled: false
    labels: {}
    namespace: ''
  prometheusRule:
    alertLabels: {}
    alerts: {}
    annotations: {}
    enabled: false
    labels: {}
    namespace: ''
    runbookUrl: ''
  serviceMonitor:
    annotations: {}
    enabled: false
    interval: ''
    labels: {}
    metricRelabelings: []
    namespace: ''
    relabelings: []
    scrapeTimeout: ''
nameOverride: ''
nats:
  authSecret: ''
  caSecret: ''
  certSecret: ''
  credsSecret: ''
  existingSecret: ''
  tokenKey: ''
  url: ''
networkPolicy:
  egress: []
  enabled: false
  ingress: []
  metrics: []
  nats: []
  notPublic: []
  publicEgress: false
  s3: []
podAnnotations: {}
podLabels: {}
priorityClasses:
  create: false
publicBaseUrl: ''
quickstart:
  apiKey:
    enabled: false
    value: ''
  nats:
    enabled: false
    password: ''
    resources: {}
  s3:
    accessKey: ''
    enabled: false
    resources: {}
    secretKey: ''
  seed: ''
  storageClassName: ''
s3:
  accessKey: ''
  endpointUrl: ''
  existingSecret: ''
  identity: false
  region: ''
  secretKey: ''
  sessionTokenKey: ''
schedulerName: ''
serviceAccounts:
  api:
    annotations: {}
    automountToken: false
    create: false
    labels: {}
    name: ''
  gateway:
    annotations: {}
    automountToken: false
    create: false
    labels: {}
    name: ''
  worker:
    annotations: {}
    automountToken: false
    create: false
    labels: {}
    name: ''
settings: {}
sidecars: []
storageKeys:
  existingSecret: ''
streamTokenKeys:
  existingSecret: ''
test:
  enabled: false
  existingSecret: ''
  podAnnotations: {}
  podLabels: {}
trustBundle:
  configMap: ''
webhookSecret:
  existingSecret: ''
  tenantsSecret: ''
workerDefaults:
  affinity: {}
  autoscaling:
    annotations: {}
    apiMetricsUrl: ''
    authenticationRef: {}
    behavior: {}
    enabled: false
    prometheusAddress: ''
    prometheusAuthModes: ''
    triggers: []
  compileCache:
    hostPath: ''
  deploymentAnnotations: {}
  extraEnv: []
  extraEnvFrom: []
  extraVolumeMounts: []
  extraVolumes: []
  gpu: {}
  initContainers: []
  model:
    catalogue: []
    hubTokenSecret: ''
    name: ''
    revision: ''
    source: ''
  modelCache:
    annotations: {}
    existingClaim: ''
    image: ''
    keep: false
    storageClassName: ''
  nodeSelector: {}
  podAnnotations: {}
  podDisruptionBudget:
    enabled: false
  podLabels: {}
  priorityClassName: ''
  resources: {}
  rollingUpdate: {}
  runtimeClassName: ''
  settings: {}
  sidecars: []
  tolerations: []
  topologySpread: {}
workers: {}
{{- end -}}
