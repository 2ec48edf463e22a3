"""Models with random weights, and tokenizers built without a download."""
