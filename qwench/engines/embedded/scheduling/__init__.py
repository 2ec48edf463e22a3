"""Which request runs in which step, and which pages of the KV cache it holds."""
