"""Defective backends: the reference engine with one defect each, which the suite must find and name."""
