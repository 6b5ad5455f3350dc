"""Greedy decoding: speculation changes no token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.verification import first_difference

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect, exposes_logits
from polydraft_conformance.control import chance_of_at_least, flip_shares
from polydraft_conformance.evidence import greedy_settings

if TYPE_CHECKING:
    from polydraft.contract import GenerationResult

    from polydraft_conformance.bench import Bench

_LONG = 160
"""Tokens of one more output that a full run looks for near ties in."""
_FALSE_ALARM = 1e-5
"""Probability that a backend whose near ties are as frequent as the control's fails for having more."""
_PRIMITIVES = (
    "test_generates",
    "test_steps_equal_prefill",
    "test_rows_equal_single_steps",
    "test_rollback_is_exact",
    "test_rounds_end_with_a_bonus_token",
)


@check(scope="case", after=_PRIMITIVES)
def test_plain_decoding_repeats(polydraft_bench: Bench) -> None:
    """Plain decoding gives the same tokens again, in this session as in the target's first one.

    Proves: The reference of all comparisons is stable: the same prompt gives the same tokens, after other calls as
    well.
    A failure means: Plain decoding depends on what ran before: state is left over from other sequences, or the engine
    is not deterministic.
    Look at: `SteppingEngine.open_sequence`, which must share nothing that changes outputs; uninitialised buffers;
    prefix caches.
    """
    evidence = polydraft_bench.evidence
    polydraft_bench.same(
        evidence.runs[1].plain,
        evidence.repeated,
        wrong="Plain decoding does not repeat itself.",
        names=("first", "again"),
        near_ties=False,
    )


@check(scope="case", after=(*_PRIMITIVES, "test_plain_decoding_repeats"))
def test_greedy_equals_plain(polydraft_bench: Bench) -> None:
    """Greedy speculative output is the plain output, token by token, inside, across and past the sliding window.

    Proves: The promise of speculative decoding: the output is that of the target alone, inside, across and past the
    sliding window. A difference passes only if the two tokens were tied up to the measured noise.
    A failure means: A token was accepted that the target did not choose, or the target computed something else while
    verifying. The message names the first different token and the two logits.
    Look at: If `test_rollback_is_exact` fails as well, `rollback`; if `test_rows_equal_single_steps` does, positions
    and masks inside `verify`; if neither does, how drafts are compared with choices. In a whole engine: its acceptance
    rule.
    """
    runs = polydraft_bench.evidence.runs
    for run in runs:
        same = polydraft_bench.same(
            run.plain,
            run.speculative,
            wrong=f"Speculation changed the greedy output, prompt {run.prompt.place} (of the window).",
        )
        expect(
            not same or run.plain.text == run.speculative.text,
            "The tokens are equal, but speculation changed the text.",
        )
    polydraft_bench.numbers["tokens_compared"] = sum(len(run.plain.token_ids) for run in runs)


@check(scope="kind", after=("test_greedy_equals_plain",), claims=exposes_logits, time_factor=4)
def test_near_ties_as_rare_as_in_control(polydraft_bench: Bench) -> None:
    """Near ties are no more frequent than where blocks alone, without a drafter, flip the plain choices.

    Proves: Near ties are not used as an excuse: they are as frequent as where the plain output is run again in blocks,
    without a drafter.
    A failure means: Speculation flips more close choices than steps of several rows alone explain: what the target
    computes while speculating differs.
    Look at: What is different in `verify` between right and wrong drafts: rows that see each other, precision, caches
    that are written twice.
    """
    near_ties = tokens = 0
    shares: list[float] = []
    outputs = [run.plain for run in polydraft_bench.evidence.runs]
    if not polydraft_bench.quick:  # few tokens hold few near ties
        outputs.append(polydraft_bench.plain(outputs[1].prompt_token_ids, **greedy_settings(_LONG)))
    for plain in outputs:
        shares += _flip_shares(polydraft_bench, plain)
        near_ties += _near_ties(polydraft_bench, plain)
        tokens += len(plain.token_ids)
    chance = chance_of_at_least(near_ties, shares)
    polydraft_bench.numbers["near_ties"] = {"found": near_ties, "expected": round(sum(shares), 3), "tokens": tokens}
    expect(
        chance >= _FALSE_ALARM,
        f"Near ties are too frequent: {near_ties} in {tokens} tokens, where blocks without a drafter flip "
        f"{sum(shares):.2f} on average (probability {chance:.2g}). What the target computes while speculating is not "
        "what it computes plainly.",
    )


def _flip_shares(bench: Bench, plain: GenerationResult) -> list[float]:
    """The control of one output, made once for all drafters of this k."""
    prompt, output, rows = plain.prompt_token_ids, plain.token_ids, bench.k + 1
    return bench.suite.cache.once(
        ("flips", bench.case.pair, rows, prompt, len(output)), lambda: flip_shares(bench.engine, prompt, output, rows)
    )


def _near_ties(bench: Bench, plain: GenerationResult) -> int:
    """Near ties along a plain output: after each one, speculation starts again from the plain text."""
    found, start = 0, 0
    while start < len(plain.token_ids):
        context, rest = (*plain.prompt_token_ids, *plain.token_ids[:start]), plain.token_ids[start:]
        result = bench.session.generate(list(context), **greedy_settings(len(rest)))
        bench.same(
            plain.model_copy(update={"prompt_token_ids": context, "token_ids": rest}),
            result,
            wrong="Speculation changed the greedy output.",
        )
        position = first_difference(rest, result.token_ids)
        if position is None:
            break
        found += 1
        start += position + 1
    return found
