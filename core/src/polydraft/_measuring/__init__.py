"""Measuring engines: what ``polydraft.tune`` and ``polydraft.bench`` share.

A ``bench`` measures: each engine in a process of its own (``processes``, whose ``child`` has a ``loaded`` engine), or
in this one (``here``). ``timed`` splits rounds into their parts, ``calls`` says what the times of calls mean,
``prompts`` are those that are measured, the built-in ones from ``texts``; ``identity`` is what a measurement holds for,
``arguments`` checks what both are given, and ``charts`` draws.
"""
