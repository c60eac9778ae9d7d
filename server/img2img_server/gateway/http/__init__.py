"""Middleware, request parsing and file responses that all routes of the gateway share."""
