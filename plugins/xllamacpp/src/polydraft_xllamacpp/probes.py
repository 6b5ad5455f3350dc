"""Probes: whether the faults of llama.cpp's server that the conformance suite excludes are still there."""

from __future__ import annotations

import polydraft
from polydraft.errors import UnsupportedError

__all__ = ["split_characters_lack_logprobs"]

_PROMPT = "# größe für übung schöne grüße für größe übung\nx = 'größe für übung schöne grüße für gr"
"""The built-in target goes on with an ``ö``, for which it has no token."""


def split_characters_lack_logprobs() -> bool:
    """Whether the server leaves out log-probabilities of a character's first tokens where it is spread over several.

    It does so in a stream and in one piece: ``completion_probabilities`` then has one entry for the whole character.
    """
    with polydraft.load("builtin:tiny-e2b", backend="xllamacpp", drafter=None) as session:
        try:
            session.generate(_PROMPT, max_new_tokens=4, logprobs=1)
        except UnsupportedError as error:
            return "spread over several tokens" in error.message
    return False
