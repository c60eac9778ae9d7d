"""The domain: jobs, their parameters, events and states. It imports the standard library only."""
