"""Whole states of a run on disk: written atomically, found again, thrown away when old."""
