"""Middleware, request parsing and files of the gateway, whatever the path."""
