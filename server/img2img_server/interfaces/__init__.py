"""Protocol classes, each with a real and an in-memory implementation."""
