"""Builds what a release publishes, into dist/: `make dist`. docs/releasing.md has the steps."""
