"""Training with a stock megatron-core; the only package that imports it."""
