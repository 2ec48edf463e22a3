"""What crosses a process: addresses, portions, flat buckets, shared buffers, weight groups, checksums."""
