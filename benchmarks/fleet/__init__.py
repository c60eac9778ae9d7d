"""Measures how jobs are shared among workers: real api, NATS and worker code, simulated devices."""
