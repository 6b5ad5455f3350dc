"""Helpers for engines: ``context_length``; in ``serving`` child servers, in ``draft_model`` a drafter."""

from polydraft.engines._context import context_length

__all__ = ["context_length"]
