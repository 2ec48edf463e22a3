"""Values and buffers between processes: addresses, portions, flat buckets, shared buffers, weight groups, checksums."""
