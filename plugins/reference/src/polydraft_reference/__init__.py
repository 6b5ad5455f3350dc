"""A tiny pure-numpy stepping engine: the oracle of polydraft's tests, and the example for plugin authors."""
