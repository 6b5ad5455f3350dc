"""The checks, one module a purpose. Every test function here is one check; its docstring says what holds if it passes.

Checks come in the order in which they build upon one another (``after``): a failure where an earlier check failed for
the same target and drafter kind is reported as its consequence.
"""
