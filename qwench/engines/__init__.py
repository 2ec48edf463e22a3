"""Inference engines behind one contract: in this process, or any server that speaks SGLang's HTTP API."""
