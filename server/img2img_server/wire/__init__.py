"""How we speak to NATS: names, bytes and the connection. Below queue and store, which use it."""
