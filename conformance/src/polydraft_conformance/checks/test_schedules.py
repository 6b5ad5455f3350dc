"""Rounds with another k each: what ``num_speculative_tokens="auto"`` does, and that it changes no token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft_conformance.any_k import any_k
from polydraft_conformance.bits import bitwise_sessions
from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect, has_model_drafter, is_bitwise, is_seed_identical

if TYPE_CHECKING:
    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_drafts_are_made", "test_greedy_equals_plain", "test_rows_equal_single_steps")
_SCHEDULES = 3


@check(
    scope="kind",
    after=(*_AFTER, "test_rollback_is_exact", "test_sample_equals_plain", "test_bitwise_output_equals_plain"),
    claims=has_model_drafter,
)
def test_any_schedule_gives_the_same_tokens(polydraft_bench: Bench) -> None:
    """Rounds may draft any number of tokens, or none for a while: the output is the plain one, greedy and seeded.

    Proves: the tokens do not depend on k, so neither on the times by which `num_speculative_tokens="auto"` picks it. In
    bitwise sessions there is no tolerance. Rejection sampling is left out: there k is fixed, since a seed's tokens
    depend on it.
    A failure means: after a round of another k, or after rounds for which nothing was proposed, the target computes
    something else.
    Look at: steps of 1 to k+1 rows after one another in `verify`, and `rollback` after each of them.
    """
    bench = polydraft_bench
    bench.need_model_drafter()
    bench.numbers["tokens_compared"] = _compare(bench, "")
    if is_bitwise(bench.capabilities) is None and (bench.case.pair == bench.suite.pairs[0] or not bench.quick):
        for session in bitwise_sessions(bench, bench.numbers.setdefault("refused", {})):
            _compare(session, f"Bitwise in {session.session.running.dtype}: ")


@check(scope="kind", after=(*_AFTER, "test_any_schedule_gives_the_same_tokens"))
def test_auto_picks_k(polydraft_bench: Bench) -> None:
    """A session with `num_speculative_tokens="auto"` says its largest k, never drafts more, and changes no token.

    Proves: the engine makes room for the largest k of the schedule, and the output is the plain one.
    A failure means: room is made for the recommended k only, or an output differs.
    Look at: `SpeculationPlan.max_draft_tokens`, which the engine's steps, masks and buffers are made for, and
    `SteppingEngine.max_draft_tokens`.
    """
    bench = polydraft_bench
    recommended = bench.engine.running.num_speculative_tokens
    with bench.opened(num_speculative_tokens="auto") as auto:
        running = auto.session.running
        largest = running.max_speculative_tokens
        expect(largest is not None, 'With `num_speculative_tokens="auto"`, `running.max_speculative_tokens` is None.')
        room = auto.engine.max_draft_tokens
        expect(room == largest, f"The largest k is {largest}, and the engine has room for {room} drafts.")
        prompt = bench.window_prompts[-1]
        settings: dict[str, Any] = {"max_new_tokens": prompt.max_new_tokens, "ignore_eos": True}
        plain = auto.session.generate(list(prompt.token_ids), speculate="off", **settings)
        for _ in range(2):
            found = auto.session.generate(list(prompt.token_ids), **settings)
            auto.same(plain, found, wrong="Picking k for each round changed the output.")
            by_position = found.stats.drafted_per_position or ()
            expect(len(by_position) <= room, f"{len(by_position)} tokens were drafted in a round; at most {room} may.")
    bench.numbers["largest_k"] = {"fixed": recommended, "auto": largest}


def _compare(bench: Bench, where: str) -> int:
    """Compare outputs under random schedules with plain ones; returns how many tokens were compared."""
    random = bench.random(f"schedules {where}")
    prompt = bench.window_prompts[-1]
    call: dict[str, Any] = {"max_new_tokens": prompt.max_new_tokens, "ignore_eos": True}
    manners = [call]
    if is_seed_identical(bench.capabilities) is None:
        manners.append({**call, "temperature": 0.9, **bench.seed(23)})
    compared = 0
    for settings in manners:
        plain = bench.session.generate(list(prompt.token_ids), speculate="off", **settings)
        for _ in range(1 if bench.quick else _SCHEDULES):
            with any_k(bench.engine, random):
                found = bench.session.generate(list(prompt.token_ids), **settings)
            how = f"temperature {settings['temperature']}" if "temperature" in settings else "greedy"
            bench.same(plain, found, wrong=f"{where}Another k in each round changed the output ({how}).")
            compared += len(found.token_ids)
    return compared
