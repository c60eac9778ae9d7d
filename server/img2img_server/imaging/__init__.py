"""Init images and results: reading, checking, preparing and encoding."""
