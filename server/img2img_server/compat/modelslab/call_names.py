"""Names in the gateway's calls of the api that the protocol does not define."""

LINK_BASE = "img2img-link-base"  # metadata: where the links of a new job shall point to
WARNING = "img2img-warning-bin"  # metadata: sentences for Job.warning, in UTF-8
MODELS_SERVICE = "img2img.v1.models"  # for the health service: has a worker ever announced a model?
