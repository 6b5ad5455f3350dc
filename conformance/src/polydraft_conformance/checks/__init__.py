"""The checks, one module per purpose. Every test function is one check; its docstring says what holds if it passes.

Checks run in the order in which they build upon one another (``after``): a failure where an earlier check failed for
the same target and drafter kind is reported as its consequence.
"""
