"""Where processes and device memory are: who runs what, and who holds the GPU."""
