"""Contracts of other services that the service keeps."""
