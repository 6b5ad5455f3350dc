"""Greedy decoding: speculation changes no token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.comparison import compare

if TYPE_CHECKING:
    from polydraft.session.base import Session

    from polydraft_conformance.evidence import Evidence

_PRIMITIVES = ("test_generates", "test_steps_equal_prefill", "test_rows_equal_single_steps", "test_rollback_is_exact")


@check(scope="case", after=_PRIMITIVES)
def test_plain_decoding_repeats(polydraft_session: Session, polydraft_evidence: Evidence) -> None:
    """Plain decoding gives the same tokens again, in this session as in the target's first one."""
    first = polydraft_evidence.generations[1].plain
    comparison = compare(
        polydraft_session,
        first.prompt_token_ids,
        first.token_ids,
        polydraft_evidence.repeated.token_ids,
        names=("first", "again"),
    )
    expect(comparison.verdict == "EXACT", f"Plain decoding does not repeat itself. {comparison.message}")


@check(scope="case", after=(*_PRIMITIVES, "test_plain_decoding_repeats"))
def test_greedy_equals_plain(
    polydraft_session: Session, polydraft_evidence: Evidence, polydraft_numbers: dict[str, Any]
) -> None:
    """Greedy speculative output is the plain output, token by token, inside, across and past the sliding window."""
    compared = 0
    for generation in polydraft_evidence.generations:
        plain, speculative = generation.plain, generation.speculative
        comparison = compare(polydraft_session, plain.prompt_token_ids, plain.token_ids, speculative.token_ids)
        expect(
            comparison.verdict == "EXACT",
            f"Speculation changed the greedy output, prompt {generation.prompt.place} (of the window). "
            f"{comparison.message}",
        )
        expect(plain.text == speculative.text, "The tokens are equal, but speculation changed the text.")
        compared += len(plain.token_ids)
    polydraft_numbers["verdict"] = "EXACT"
    polydraft_numbers["tokens_compared"] = compared
