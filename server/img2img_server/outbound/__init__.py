"""The policy for every address that a caller supplies."""
