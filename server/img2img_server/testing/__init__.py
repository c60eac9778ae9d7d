"""Implementations of every seam inside one process, for tests of this project and of others."""
