"""Helpers for engines: ``context_length``; in ``serving`` child servers, in ``draft_model`` a drafter."""

from polydraft.engine_parts._context import context_length

__all__ = ["context_length"]
