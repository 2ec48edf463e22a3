"""The embedded engine behind the HTTP APIs of SGLang and OpenAI."""
