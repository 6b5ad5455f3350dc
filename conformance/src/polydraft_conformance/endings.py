"""Plain outputs that end by themselves, with EOS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft_conformance.claims import expect
from polydraft_conformance.prompts import chats, texts

if TYPE_CHECKING:
    from polydraft.contract import GenerationResult, Prompt

    from polydraft_conformance.bench import Bench

__all__ = ["EOS_LIMIT", "ended_by_eos"]

EOS_LIMIT = 96
"""Tokens of an output in which EOS is waited for."""


def ended_by_eos(bench: Bench) -> list[tuple[Prompt, GenerationResult]]:
    """A few prompts whose plain greedy outputs EOS ends, with these outputs.

    Raises:
        AssertionError: There is none: a check would prove nothing.
    """

    def make() -> list[tuple[Prompt, GenerationResult]]:
        found: list[tuple[Prompt, GenerationResult]] = []
        seed = bench.suite.options.seed
        asked: list[Prompt] = [[{"role": "user", "content": chat}] for chat in chats(seed)]
        for prompt in [*asked, *(text[:600] for text in texts(seed))]:
            result = bench.session.generate(prompt, max_new_tokens=EOS_LIMIT, speculate="off")
            if result.finish_reason == "eos":
                found.append((prompt, result))
            if len(found) == (2 if bench.quick else 3):
                break
        return found

    ended = bench.suite.cache.once(("ended by EOS", bench.case.pair), make)
    expect(bool(ended), "The check proves nothing: EOS ends none of the plain outputs.")
    return ended
