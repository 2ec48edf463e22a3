"""Readers and writers of checkpoint formats."""
