"""Drafters in MLX: Gemma 4 assistants and draft models."""
