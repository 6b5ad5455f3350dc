"""Hugging Face Transformers behind polydraft."""
