"""The embedded engine behind SGLang's HTTP API."""
