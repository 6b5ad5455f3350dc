"""Ollama behind polydraft: models of a running server, with their drafters."""
