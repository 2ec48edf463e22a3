"""Models: what Hugging Face folders hold, how they are read and written, and small ones made on the spot."""
