"""Where files go: the bucket of the service and those of tenants."""
