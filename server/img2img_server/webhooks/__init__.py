"""Webhooks of ended jobs: from the outbox to their receivers."""
