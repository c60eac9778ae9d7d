"""The seams: protocols that have a real and an in-memory implementation."""
