"""Models: Hugging Face folders and their readers and writers, and small models with random weights."""
