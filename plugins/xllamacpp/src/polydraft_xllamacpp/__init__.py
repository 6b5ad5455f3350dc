"""llama.cpp from a wheel behind polydraft: no compiler is needed."""
