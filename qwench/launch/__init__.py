"""From a plan to a run: the only place that chooses implementations."""
