"""Breaks the parts of a service on this machine under load and counts the damage."""
