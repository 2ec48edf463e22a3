"""One forward pass and one sampled token for every scheduled request."""
