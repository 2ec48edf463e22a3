"""Learning from rollouts: batches, losses, and the backends that take optimizer steps."""
