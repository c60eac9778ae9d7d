"""The worker role: takes jobs from the queue, runs them on the engine and stores the results."""
