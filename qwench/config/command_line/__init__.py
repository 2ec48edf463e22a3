"""From command-line words to a configuration."""
