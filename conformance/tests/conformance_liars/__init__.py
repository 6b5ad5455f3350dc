"""Backends that lie: the reference engine with one defect each, which the suite must find and name."""
