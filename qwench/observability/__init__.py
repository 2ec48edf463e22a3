"""What is measured, shown and kept of a run."""
