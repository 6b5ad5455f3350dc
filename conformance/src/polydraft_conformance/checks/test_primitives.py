"""The primitives of a stepping engine, by their logits: steps, prefill and rollback agree at the window's edge."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from polydraft.verification import GreedySampler, difference, epsilon_of, first_difference

from polydraft_conformance.catalog import check, unchecked
from polydraft_conformance.claims import expect, exposes_logits, has_model_drafter
from polydraft_conformance.primitives import logits_of, prefill_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Proposal, SteppingEngine
    from polydraft.verification import Logits

    from polydraft_conformance.bench import Bench


@check(scope="target", after=("test_loads_what_was_asked", "test_generates"), claims=exposes_logits)
def test_rows_equal_single_steps(polydraft_bench: Bench) -> None:
    """A step of k+1 tokens gives the logits of k+1 steps of one token, up to the dtype's rounding.

    Proves: Row i of a step of k+1 tokens has the logits of the same token run by itself, up to rounding. All else is
    built upon it.
    A failure means: Inside one step a token sees a wrong position, or tokens that it must not see.
    Look at: In `EngineSequence.verify`, the positions of the rows (`length`, `length + 1`, ...) and the causal mask
    between them; in `prefill`, chunks.
    """
    noise, running = polydraft_bench.noise, polydraft_bench.session.running
    polydraft_bench.numbers["noise"] = {
        "rows": noise.rows,
        "prefill": noise.prefill,
        "largest_logit": noise.largest_logit,
    }
    bound = noise.rounding(running.precision, experts=running.has_experts)
    for name, value in (("one step of several tokens", noise.rows), ("a prefill", noise.prefill)):
        expect(
            value <= bound,
            f"Logits of single steps and of {name} differ by {value:.3g}, more than rounding in {running.computes} "
            f"explains ({bound:.3g}): positions or masks within a step are wrong.",
        )


@check(scope="target", after=("test_rows_equal_single_steps",), claims=exposes_logits)
def test_steps_equal_prefill(polydraft_bench: Bench) -> None:
    """Plain steps across the window's edge give a fresh prefill's logits: the KV cache past the window is right.

    Proves: Decoding past the sliding window's edge gives what a fresh prefill of the same text gives: the key-value
    cache holds the right rows.
    A failure means: From the context length in the message on, the cache holds too few, too many or wrong rows.
    Look at: Where the window is cut and where a ring begins again: one token too early or too late is the usual
    mistake.
    """
    engine, text, window = polydraft_bench.engine, polydraft_bench.context, polydraft_bench.window
    sampler = GreedySampler(engine)
    start = max(1, window - 3)
    rows: dict[int, Logits] = {}
    with closing(engine.open_sequence()) as sequence:
        sequence.prefill(text[:start], sampler)
        for length in range(start + 1, len(text) + 1):
            row = logits_of(sequence.verify([text[length - 1]], sampler, keep_logits=True))[0]
            if length <= window + 4 or length % 5 == 0 or abs(length - 2 * window) <= 2:
                rows[length] = row
    worst, at = 0.0, start  # compared when the sequence is closed: an engine may hold one at a time
    for length, row in rows.items():
        worst, at = max((worst, at), (difference(row, _fresh(polydraft_bench, text[:length])), length))
    polydraft_bench.numbers["largest_difference"] = worst
    _expect_within(
        worst, polydraft_bench.tolerance, f"after plain steps to a context of {at} tokens (sliding window {window})"
    )


@check(scope="target", after=("test_rows_equal_single_steps", "test_steps_equal_prefill"), claims=exposes_logits)
def test_rollback_is_exact(polydraft_bench: Bench) -> None:
    """After a rollback at every position around the window's edge, the next step's logits are a fresh prefill's.

    Proves: After wrong drafts and a rollback, the next step computes what it computes without them, at every position
    around the window's edge.
    A failure means: A rolled-back token can still be seen, or one that must be seen is gone. The message says how many
    tokens were kept and dropped.
    Look at: `EngineSequence.rollback`: each layer's length, rings that have already overwritten what comes back (keep
    k+1 spare rows), masks made from an old length.
    """
    engine, text, window, k = polydraft_bench.engine, polydraft_bench.context, polydraft_bench.window, polydraft_bench.k
    worst, where, stale = 0.0, "", 0.0
    lengths = [*range(max(1, window - k - 2), window + 3), 2 * window - 1, 2 * window]
    if polydraft_bench.quick:
        lengths = lengths[::2]
    for length in lengths:
        for accepted in range(k + 1) if length in (window, 2 * window) else (0, k // 2, k):
            right, wrong = _step(engine, text, length, accepted, k)
            row, longer = _step_after_rollback(engine, text, length, right, wrong)
            kept = length + len(right)
            gap = difference(row, _fresh(polydraft_bench, text[: kept + 1]))
            if gap >= worst:
                worst = gap
                where = f"{length} tokens, then {len(right)} right and {len(wrong)} wrong, rolled back to {kept}"
            if longer is not None:
                stale = max(stale, difference(row, longer))
    polydraft_bench.numbers["largest_difference"] = worst
    polydraft_bench.numbers["difference_of_a_stale_row"] = stale
    limit = polydraft_bench.tolerance
    _expect_within(
        worst, limit, f"after a rollback ({where}; sliding window {window}): rows are left that were rolled back"
    )
    hidden = f"a wrong KV row changes logits by {stale:.3g} only, noise explains {limit:.3g}."
    if stale <= limit and epsilon_of(polydraft_bench.session.running.precision) > epsilon_of("float32"):
        unchecked(f"Rounding hides what is looked for: {hidden}")
    expect(stale > limit, f"The check proves nothing: {hidden}")


@check(scope="kind", after=("test_rollback_is_exact", "test_greedy_equals_plain"), claims=has_model_drafter)
def test_drafter_rolls_back(polydraft_bench: Bench) -> None:
    """After a rollback the drafter proposes what it proposes on a fresh sequence.

    Proves: The drafter forgets rejected tokens with the target: it proposes what it proposes on a fresh sequence.
    A failure means: The drafter remembers what was rolled back, or has another position than the target.
    Look at: The drafter's own cache and position in `rollback` and `propose`; `DraftModelSequence` does this for draft
    models.
    """
    polydraft_bench.need_model_drafter()
    engine, text, window, k = polydraft_bench.engine, polydraft_bench.context, polydraft_bench.window, polydraft_bench.k
    sampler = GreedySampler(engine)
    for length in (max(1, window // 2), window - 1, window, window + 1, 2 * window):
        for accepted in (0, k // 2, k):
            right, wrong = _step(engine, text, length, accepted, k)
            newest = text[length + len(right)]
            with closing(engine.open_sequence()) as sequence:
                sequence.prefill(text[:length], sampler)
                sequence.propose(text[length], k, sampler)
                sequence.verify([*right, *wrong], sampler)
                sequence.rollback(length + len(right))
                found = sequence.propose(newest, k, sampler, keep_logits=True)
            with closing(engine.open_sequence()) as sequence:
                # Through a verify as well: a drafter may read the target's hidden state of the last row.
                sequence.prefill(text[:length], sampler)
                for token in right:
                    sequence.verify([token], sampler)
                wanted = sequence.propose(newest, k, sampler, keep_logits=True)
            expect(
                _same_drafts(found, wanted, polydraft_bench.tolerance),
                f"After a rollback to {length + len(right)} tokens the drafter proposes {found.token_ids}, on a fresh "
                f"sequence {wanted.token_ids} (sliding window {window}): it remembers what was rolled back.",
            )


def _step(
    engine: SteppingEngine, text: Sequence[int], length: int, accepted: int, k: int
) -> tuple[list[int], list[int]]:
    """A step after ``length`` tokens: the newest token and the accepted drafts, then k - accepted wrong drafts."""
    first = length + 1 + accepted
    wrong = [(token + 1) % engine.tokenizer.vocab_size for token in text[first : length + 1 + k]]
    return list(text[length:first]), wrong


def _same_drafts(found: Proposal, wanted: Proposal, limit: float) -> bool:
    """Whether two proposals are the same, up to a token that is tied with another one within ``limit``.

    The target's rows come from steps of several tokens in one, of one token in the other: their bits differ.
    """
    place = first_difference(wanted.token_ids, found.token_ids)
    if place is None:
        return True
    if found.logits is None or wanted.logits is None or place >= min(len(found.token_ids), len(wanted.token_ids)):
        return False
    one, other = wanted.token_ids[place], found.token_ids[place]
    rows = (proposal.logits.numpy()[place] for proposal in (found, wanted) if proposal.logits is not None)
    return all(abs(float(row[one]) - float(row[other])) <= 2 * limit for row in rows)


def _step_after_rollback(
    engine: SteppingEngine, text: Sequence[int], length: int, right: Sequence[int], wrong: Sequence[int]
) -> tuple[Logits, Logits | None]:
    """Logits of the next token's step after a rollback, and what they would be with the wrong rows still there."""
    sampler = GreedySampler(engine)
    newest = text[length + len(right)]
    with closing(engine.open_sequence()) as sequence:
        sequence.prefill(list(text[:length]), sampler)
        sequence.verify([*right, *wrong], sampler)
        sequence.rollback(length + len(right))
        row = logits_of(sequence.verify([newest], sampler, keep_logits=True))[0]
    if not wrong or length % 4:
        return row, None
    return row, prefill_logits(engine, [*text[:length], *right, wrong[0], newest])[-1]


def _expect_within(worst: float, limit: float, where: str) -> None:
    expect(
        worst <= limit,
        f"Logits differ from a fresh prefill's by {worst:.3g} {where}. The engine's own noise explains at most "
        f"{limit:.3g}.",
    )


def _fresh(bench: Bench, token_ids: Sequence[int]) -> Logits:
    """Logits after a fresh prefill, made once for each context."""
    return bench.suite.cache.once(
        ("fresh", bench.case.pair, tuple(token_ids)), lambda: prefill_logits(bench.engine, token_ids)[-1]
    )
