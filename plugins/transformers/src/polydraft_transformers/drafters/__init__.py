"""Drafters that run on the device: each extends a target's sequence."""
