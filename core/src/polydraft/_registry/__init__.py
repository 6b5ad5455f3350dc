"""The registry: pairs of target and drafter, known faults of engines, and the backends known by name."""
