"""The worker role: the queue on one side, the engine and the store on the other."""
