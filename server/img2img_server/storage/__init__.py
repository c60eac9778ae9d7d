"""File storage: the bucket of the service and those of tenants."""
