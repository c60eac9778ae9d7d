"""The adapter of the engine to the diffusers library."""
