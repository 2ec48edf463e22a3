"""Training with the Hugging Face module and FSDP2."""
