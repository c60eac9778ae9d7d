"""Names that the gateway and the api share and that the protocol does not define."""

# Annotations of a job: values of HTTP callers for which JobSpec has no field.
INSTANT_RESPONSE = "http.instant_response"  # Present if the caller sent a track_id.
ENHANCE_STYLE = "http.enhance_style"
TRACK_ID_TYPE = "http.track_id_type"  # "integer"; absent for a string
LINK_BASE = "http.link_base"  # base URL of fetch_result, fixed at acceptance

# gRPC metadata of the gateway's calls.
LINK_BASE_METADATA = "img2img-link-base"  # base URL of the links of a new job
FINGERPRINT_METADATA = "img2img-fingerprint"  # of the HTTP request, if the JobSpec differs from it
WARNING_METADATA = "img2img-warning-bin"  # sentences for Job.warning, in UTF-8

# A service name of the gRPC health check: SERVING once a worker has announced a model.
MODELS_SERVICE = "img2img.v1.models"
