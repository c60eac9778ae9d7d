"""Fixtures by subject; each file says what it offers."""

pytest_plugins = ["fixtures_engines"]
