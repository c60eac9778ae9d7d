"""What HTTP callers get back and JobSpec has no field for travels as annotations of the job."""

INSTANT_RESPONSE = "http.instant_response"  # present: it was asked for
ENHANCE_STYLE = "http.enhance_style"
TRACK_ID_TYPE = "http.track_id_type"  # "integer"; absent: a string
LINK_BASE = "http.link_base"  # where fetch_result points to, fixed at acceptance
