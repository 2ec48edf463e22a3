"""Optimizers, learning-rate schedules and their buffers."""
