"""An inference engine in this process: paged KV cache, continuous batching, one prefill for each group of equal prompts."""
