"""What the service is about: jobs, their parameters, events and states. Standard library only."""
