"""What the HTTP contract says about a job, made once: for the gateway's answers and webhooks."""
