"""Adapters to NATS JetStream: connection, streams, buckets, queues and records."""
