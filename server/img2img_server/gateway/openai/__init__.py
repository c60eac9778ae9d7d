"""OpenAI's Images API, see docs/openai-api.md."""
