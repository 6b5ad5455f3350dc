"""llama.cpp behind polydraft."""
