"""Methods of the gRPC service as JSON, and job events as server-sent events."""
