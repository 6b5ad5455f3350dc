"""Greedy decoding: speculation changes no token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import engine_of, expect, exposes_logits
from polydraft_conformance.comparison import compare, expect_same
from polydraft_conformance.control import Turns, chance_of_at_least, turns
from polydraft_conformance.evidence import greedy_settings, plain_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft import Session

    from polydraft_conformance.evidence import Evidence
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

_LONG = 160
"""Tokens of the output that a full run looks for near ties in, beside the usual ones."""
_FALSE_ALARM = 1e-5
"""Chance that a backend whose near ties are as frequent as the control's fails for having more."""
_PRIMITIVES = (
    "test_generates",
    "test_steps_equal_prefill",
    "test_rows_equal_single_steps",
    "test_rollback_is_exact",
    "test_rounds_end_with_a_bonus_token",
)


@check(scope="case", after=_PRIMITIVES)
def test_plain_decoding_repeats(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_evidence: Evidence
) -> None:
    """Plain decoding gives the same tokens again, in this session as in the target's first one."""
    first = polydraft_evidence.generations[1].plain
    comparison = compare(
        polydraft_suite,
        polydraft_case,
        polydraft_session,
        first.prompt_token_ids,
        first.token_ids,
        polydraft_evidence.repeated.token_ids,
        names=("first", "again"),
    )
    expect(comparison.verdict == "EXACT", f"Plain decoding does not repeat itself. {comparison.message}")


@check(scope="case", after=(*_PRIMITIVES, "test_plain_decoding_repeats"))
def test_greedy_equals_plain(
    polydraft_suite: Suite,
    polydraft_case: Case,
    polydraft_session: Session,
    polydraft_evidence: Evidence,
    polydraft_numbers: dict[str, Any],
) -> None:
    """Greedy speculative output is the plain output, token by token, inside, across and past the sliding window."""
    compared = 0
    for generation in polydraft_evidence.generations:
        plain, speculative = generation.plain, generation.speculative
        same = expect_same(
            polydraft_suite,
            polydraft_case,
            polydraft_session,
            plain.prompt_token_ids,
            plain.token_ids,
            speculative.token_ids,
            wrong=f"Speculation changed the greedy output, prompt {generation.prompt.place} (of the window).",
        )
        expect(not same or plain.text == speculative.text, "The tokens are equal, but speculation changed the text.")
        compared += len(plain.token_ids)
    polydraft_numbers["tokens_compared"] = compared


@check(scope="kind", after=("test_greedy_equals_plain",), claims=exposes_logits, time_factor=4)
def test_near_ties_as_rare_as_in_control(
    polydraft_suite: Suite,
    polydraft_case: Case,
    polydraft_session: Session,
    polydraft_evidence: Evidence,
    polydraft_numbers: dict[str, Any],
) -> None:
    """Near ties are no more frequent than where blocks alone, without a drafter, turn the plain choices."""
    suite, case, session = polydraft_suite, polydraft_case, polydraft_session
    engine = engine_of(session)
    rows = min(case.k, engine.max_draft_tokens) + 1
    near_ties = tokens = 0
    shares: list[float] = []
    outputs = [generation.plain for generation in polydraft_evidence.generations]
    if not suite.options.quick:  # few tokens hold few near ties
        prompt = outputs[1].prompt_token_ids
        outputs.append(plain_result(suite, session, case, prompt, greedy_settings(_LONG)))
    for plain in outputs:
        key = ("turns", case.pair, case.k, plain.prompt_token_ids, len(plain.token_ids))
        if key not in suite.cache:
            suite.cache[key] = turns(engine, plain.prompt_token_ids, plain.token_ids, rows)
        control: Turns = suite.cache[key]
        shares += control.shares
        near_ties += _near_ties(suite, case, session, plain.prompt_token_ids, plain.token_ids)
        tokens += len(plain.token_ids)
    chance = chance_of_at_least(near_ties, shares)
    polydraft_numbers["near_ties"] = {"found": near_ties, "expected": round(sum(shares), 3), "tokens": tokens}
    expect(
        chance >= _FALSE_ALARM,
        f"Near ties are too frequent: {near_ties} in {tokens} tokens, where blocks without a drafter turn "
        f"{sum(shares):.2f} on average (probability {chance:.2g}). What the target computes while speculating is not "
        "what it computes plainly.",
    )


def _near_ties(suite: Suite, case: Case, session: Session, prompt: Sequence[int], plain: Sequence[int]) -> int:
    """Near ties along a plain output: behind each one, speculation starts again from the plain text."""
    start = found = 0
    while start < len(plain):
        context = [*prompt, *plain[:start]]
        rest = plain[start:]
        result = session.generate(context, **greedy_settings(len(rest)))
        comparison = compare(suite, case, session, context, rest, result.token_ids)
        expect(comparison.passes, f"Speculation changed the greedy output. {comparison.message}")
        if comparison.position is None:
            break
        found += 1
        start += comparison.position + 1
    return found
