"""The drafter's context far from the start: tokens, positions and hidden states, after hundreds of rounds."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from polydraft.verification import GreedySampler, difference, first_difference

from polydraft_conformance.any_k import any_k
from polydraft_conformance.catalog import check, unchecked
from polydraft_conformance.claims import expect, exposes_logits, has_model_drafter
from polydraft_conformance.counting import logged
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.primitives import logits_of
from polydraft_conformance.reference_logits import recorded
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from polydraft.contract import Proposal
    from polydraft.verification import Logits

    from polydraft_conformance.bench import Bench
    from polydraft_conformance.counting import WatchedRound

_NOISE = 8
"""Times the tolerance of the target's logits: the drafter's noise comes on top of it."""
_SHARE = 2e-4
"""Of the largest logit: a wrong position or token changes logits by hundreds of times as much."""
_BEST = 20
_MARGIN = 0.3
"""Share of the accepted drafts that an engine may lose: near ties, and windows that differ by a token or two."""
_MASKED = -1e4
"""Logits below it are masks."""


@check(
    scope="method",
    after=("test_drafter_rolls_back", "test_greedy_equals_plain", "test_long_outputs_draft_k_tokens"),
    claims=lambda capabilities: exposes_logits(capabilities) or has_model_drafter(capabilities),
)
def test_far_drafts_equal_fresh_ones(polydraft_bench: Bench) -> None:
    """After hundreds of rounds, the drafter proposes what it proposes on a fresh sequence of the same tokens.

    Proves: through acceptances, rejections and rollbacks up to a context of 400 tokens, the drafter sees the tokens,
    positions and hidden states that it sees right after a prefill.
    A failure means: a stale hidden state or cache row after a rejection, a position that drifts, a context that is cut.
    Look at: what the drafter keeps between rounds, and what a rollback does to it.
    """
    bench = polydraft_bench
    bench.need_model_drafter()
    engine, long = bench.engine, bench.long_run
    text = long.text
    assert long.log is not None
    compared: list[int] = []
    for watched in long.log.watched:
        sampler = GreedySampler(engine)
        with closing(engine.open_sequence()) as sequence:
            sequence.prefill(text[: watched.length], sampler)
            fresh = sequence.propose(watched.newest, len(watched.drafts), sampler, keep_logits=True)
            target = logits_of(sequence.verify([watched.newest], sampler, keep_logits=True))[0]
        # Where the target's own rows differ, other checks say so: the drafter may read them.
        if watched.target is not None and difference(watched.target, target) > bench.tolerance:
            continue
        if problem := _problem(bench, watched, fresh):
            before = f"at contexts of {compared} tokens it is right" if compared else "no context before was compared"
            raise AssertionError(
                f"The drafter's context is wrong at a context of {watched.length} tokens, after "
                f"{watched.length - long.prompt_length} tokens of output: {problem}. It sees another token, position, "
                f"hidden state or cache there; {before} (sliding window {bench.window})."
            )
        compared.append(watched.length)
    bench.numbers["contexts"] = compared
    if not compared:
        unchecked("The target's own logits depend on how its tokens were run, so no context could be compared.")


@check(scope="method", after=("test_far_drafts_equal_fresh_ones",), claims=has_model_drafter)
def test_drafts_after_plain_rounds_equal_fresh_ones(polydraft_bench: Bench) -> None:
    """After rounds for which nothing was proposed, the drafter proposes what it does on a fresh sequence.

    Proves: a drafter with a state of its own follows the tokens of plain rounds before it drafts again, as rounds of
    `num_speculative_tokens="auto"` need it.
    A failure means: its state is that of the tokens when it last drafted, or it takes a rejected draft for one of them.
    Look at: how `propose` finds the tokens that the drafter has not run yet.
    """
    bench = polydraft_bench
    bench.need_model_drafter()
    engine, random = bench.engine, bench.random("plain rounds")
    prompt = bench.prompt(20, variant=6)
    watch = sorted(random.sample(range(24, 100), 8))
    with logged(bench.session, watch) as logs, any_k(engine, random):
        found = streamed(bench.session, prompt, **greedy_settings(90))
    assert logs
    text = [*prompt, *found.token_ids]
    compared = 0
    for watched in logs[-1].watched:
        sampler = GreedySampler(engine)
        with closing(engine.open_sequence()) as sequence:
            sequence.prefill(text[: watched.length], sampler)
            fresh = sequence.propose(watched.newest, len(watched.drafts), sampler, keep_logits=True)
        problem = _problem(bench, watched, fresh)
        expect(
            not problem,
            f"After plain rounds the drafter's context is wrong, at a context of {watched.length} tokens: {problem}.",
        )
        compared += 1
    bench.numbers["contexts"] = compared


@check(scope="method", after=("test_statistics_equal_counts", "test_greedy_equals_plain"), claims=has_model_drafter)
def test_far_acceptance_equals_reference(polydraft_bench: Bench) -> None:
    """After a context of 400 tokens, as many drafts are accepted as with the Transformers backend.

    Proves: the built-in pair's drafter is of the same use at far positions, on whole engines as well.
    A failure means: beyond some position, the drafter is given another position, window or context.
    Look at: the drafter's positions, its sliding window, and limits of its context.
    """
    bench = polydraft_bench
    bench.need_model_drafter()
    records = [record for record in recorded(bench.case) if "far" in record]
    if not records:
        unchecked(f"No acceptance is recorded for {bench.case.pair.name} with {bench.case.drafter}.")
    if bench.session.running.dtype.rpartition(".")[2] != "float32":
        unchecked("Acceptance is recorded in float32, and the session runs in another dtype.")
    record = records[0]
    far, context = record["far"], record["context"]
    if far["k"] != bench.case.k:
        unchecked(f"Acceptance is recorded for k={far['k']}, not for k={bench.case.k}.")
    found = streamed(bench.session, context, **greedy_settings(len(far["output"])))
    same = first_difference(far["output"], found.token_ids)
    if same is not None and same < len(far["output"]) // 2:
        unchecked(f"The output differs from the recorded one at token {same}: a near tie, or a fault of the target.")
    if any(one.accepted is None for one in found.rounds):
        unchecked("The engine does not report accepted drafts by round.")
    # Up to the first difference only. Both count whole rounds: the last one may reach past it.
    end = len(far["output"]) if same is None else same
    accepted = sum(one.accepted or 0 for one in found.rounds if one.before < end)
    wanted, before = 0, 0
    for count in far["accepted"]:
        wanted += count if before < end else 0
        before += count + 1
    least = (1 - _MARGIN) * wanted - 2
    bench.numbers["far_acceptance"] = {"accepted": accepted, "reference": wanted, "context": len(context)}
    expect(
        accepted >= least,
        f"The drafter's context is wrong beyond {len(context)} tokens: {accepted} drafts are accepted in {end} tokens, "
        f"{wanted} with the Transformers backend (at least {least:.0f} were expected). Its position, window or cache "
        "there is another one.",
    )


def _problem(bench: Bench, found: WatchedRound, fresh: Proposal) -> str:
    """How a proposal differs from that of a fresh sequence; empty if noise explains it."""
    if len(found.drafts) != len(fresh.token_ids):
        return f"{len(found.drafts)} tokens are drafted, {len(fresh.token_ids)} on a fresh sequence"
    if found.drafter is None or fresh.logits is None:
        same = found.drafts == fresh.token_ids
        return "" if same else f"it drafts {found.drafts}, on a fresh sequence {fresh.token_ids}"
    rows = fresh.logits.numpy()
    for index, (one, other) in enumerate(zip(found.drafter, rows, strict=True)):
        gap, limit = _gap(one, other), max(_NOISE * bench.tolerance, _SHARE * _largest(other))
        if gap > limit:
            return (
                f"it drafts {found.drafts}, on a fresh sequence {fresh.token_ids}; the logits of draft {index + 1} "
                f"differ by {gap:.3g}, noise explains {limit:.3g}"
            )
        if found.drafts[index] != fresh.token_ids[index]:
            break  # a tie: later rows follow another token
    return ""


def _gap(one: Logits, other: Logits) -> float:
    """Largest difference at the likeliest tokens of ``other``; masked tokens of either are left out."""
    best = np.argsort(-other, kind="stable")[:_BEST]
    usable = best[(one[best] > _MASKED) & (other[best] > _MASKED)]
    # A drafter may look at some of the tokens only: what one leaves out cannot be compared, but not all of it.
    return float(np.abs(one[usable] - other[usable]).max()) if len(usable) else float("inf")


def _largest(row: Logits) -> float:
    usable = row[row > _MASKED]
    return float(np.abs(usable).max()) if len(usable) else 0.0
