"""The interfaces: protocols with a real and an in-memory implementation."""
