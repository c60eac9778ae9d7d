"""Tells callers by HTTP that their jobs have ended: into the outbox first, from there to them."""
