"""HTTP contracts of other services that this service implements."""
