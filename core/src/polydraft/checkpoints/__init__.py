"""Checkpoints: what a name stands for, which files it has, and whether target and drafter fit. No weights are read."""
