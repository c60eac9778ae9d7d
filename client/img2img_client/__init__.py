"""Client of the img2img service."""
