"""Helpers for engines: ``context_length``; in ``serving`` child servers, in ``draft_model`` a drafter."""

from polydraft.engines.context import context_length

__all__ = ["context_length"]
