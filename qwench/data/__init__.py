"""Data sets: rows to prompts or training sequences, and their division into micro-batches."""
