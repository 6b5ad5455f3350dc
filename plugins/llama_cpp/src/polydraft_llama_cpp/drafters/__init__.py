"""Drafters that llama.cpp runs for a target: Gemma 4's MTP assistants."""
