"""In-memory implementations of every interface, for tests of this project and of others."""
