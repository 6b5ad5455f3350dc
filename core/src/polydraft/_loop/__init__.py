"""The speculative loop, once for every stepping engine: rounds, acceptance, stops, limits, statistics, cancelling."""
