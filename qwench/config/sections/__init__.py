"""One frozen dataclass for each section of the flags."""
