"""Makes a better prompt out of a short one, for requests with enhance_prompt."""
