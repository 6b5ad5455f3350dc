"""Conformance suite of polydraft: ``pytest --pyargs polydraft_conformance --polydraft-backend NAME``.

Where to look: ``checks/`` holds the checks, ``bench`` what they work with, ``plugin`` pytest's hooks, ``catalog`` the
checks' names, ``pairs`` what they run on, ``exclusions`` what a backend may leave out, ``report`` the result.
"""

__version__ = "0.1.0"
