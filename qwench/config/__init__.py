"""Configuration: one frozen dataclass for each section, turned into flat flags."""
