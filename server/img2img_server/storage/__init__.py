"""Stores files in the bucket of the service and in the buckets of tenants."""
