"""Conformance suite of polydraft: ``pytest --pyargs polydraft_conformance --polydraft-backend NAME``.

Where to look: ``checks/`` holds what is checked, ``plugin`` is all that pytest sees, ``catalog`` names the checks,
``pairs`` says on what they run, ``exclusions`` what a backend may leave out, ``report`` what comes out.
"""

__version__ = "0.1.0"
