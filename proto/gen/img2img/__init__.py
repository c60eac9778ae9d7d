"""Generated protobuf and gRPC stubs of the img2img service."""
