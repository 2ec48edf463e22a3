"""The mathematics of training: tensors in, tensors out; no ranks, no configuration, no logging."""
