"""How the service speaks to NATS JetStream, and everything that lies there."""
