"""Reads, checks, prepares and encodes images."""
