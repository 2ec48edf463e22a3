"""Metrics, console, log files and recorded rollouts of a run."""
