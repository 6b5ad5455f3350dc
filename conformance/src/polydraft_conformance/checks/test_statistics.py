"""Statistics: they equal what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft_conformance.catalog import check, unchecked
from polydraft_conformance.claims import expect
from polydraft_conformance.counting import logged
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.prompts import chats
from polydraft_conformance.streams import streamed
from polydraft_conformance.truth import Counted, expect_agreement, expect_true_statistics

if TYPE_CHECKING:
    from polydraft.contract import Prompt

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_drafts_are_made", "test_rounds_end_with_a_bonus_token")
_UNCHECKED = (
    "The engine does not report what it drafted and accepted in each round, so its totals were only compared with one "
    "another and with the number of tokens."
)
_CUT_TOKENS = 24
"""Limit of outputs that something else should end earlier."""
_REQUESTS = 30


@check(scope="case", after=("test_generates", "test_rounds_end_with_a_bonus_token"))
def test_statistics_equal_counts(polydraft_bench: Bench) -> None:
    """Steps, rounds, drafted and accepted tokens equal the suite's counts at the engine and in the stream's rounds.

    Proves: the statistics of a generation are what happened: the engine's calls were logged by the suite (stepping
    engines), and the rounds of a stream add up to them.
    A failure means: the totals are estimated, come from another request, or count what was not emitted.
    Look at: the counts that the engine passes to ``Generation.emit``, and ``Generation.report`` if it is called.
    """
    runs = [
        Counted(f"prompt {run.prompt.place} of the window", run.streamed, run.log)
        for run in polydraft_bench.evidence.runs
    ]
    if not expect_true_statistics(runs):
        unchecked(_UNCHECKED)


@check(scope="case", after=("test_generates", "test_rounds_end_with_a_bonus_token", "test_statistics_equal_counts"))
def test_statistics_add_up(polydraft_bench: Bench) -> None:
    """Counts agree with one another and with the output; plain decoding drafts nothing.

    Proves: accepted <= drafted, positions sum up to the total, and the tokens are those of the steps and accepted
    drafts.
    A failure means: numbers that cannot all be true, whatever the engine did.
    Look at: what is counted as a round, a step, and an accepted token (the bonus token is none).
    """
    for run in polydraft_bench.evidence.runs:
        where = f"prompt {run.prompt.place} of the window"
        expect_agreement(run.speculative.stats, where)
        plain = run.plain.stats
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            expect(getattr(plain, name) in (0, None), f"Plain decoding reports {name}={getattr(plain, name)}.")
        for name in ("prefill_seconds", "decode_seconds"):
            seconds = getattr(plain, name)
            expect(seconds is None or seconds >= 0, f"stats.{name} is {seconds}.")


@check(scope="method", after=(*_AFTER, "test_statistics_equal_counts", "test_eos_ends_the_output"))
def test_statistics_of_outputs_cut_short(polydraft_bench: Bench) -> None:
    """Counts are right when a limit, a stop id, a stop string, EOS or a cancel ends the output inside a draft.

    Proves: drafts that the end cut off are not counted as accepted, no round is counted after the end, and what a
    cancelled stream reports is what it gave, for greedy and for sampled outputs.
    A failure means: the engine counts what it accepted, not what came out.
    Look at: the number of accepted tokens of the last round, and totals that are read after the end.
    """
    runs: list[Counted] = []
    random = polydraft_bench.random("ends")
    settings = _greedy_and_sampled(polydraft_bench)
    long = polydraft_bench.long_run
    prompt = list(long.plain.prompt_token_ids)
    tokens = long.streamed.token_ids[:_CUT_TOKENS]
    # First occurrences only: a stop ends the output there.
    places = [place for place in long.streamed.inside_drafts() if place < len(tokens)]
    places = [place for place in places if tokens[place] not in tokens[:place]] or list(range(1, len(tokens)))
    for how, sampling in settings:
        runs += [
            _run(polydraft_bench, f"{how}, limit {limit}", prompt, max_new_tokens=limit, **sampling)
            for limit in random.sample(range(2, _CUT_TOKENS), 2)
        ]
        for place in random.sample(places, min(2, len(places))):
            stop = tokens[place]
            cut = {"max_new_tokens": _CUT_TOKENS, "stop_token_ids": [stop], **sampling}
            runs.append(_run(polydraft_bench, f"{how}, stop id {stop}", prompt, **cut))
            text = polydraft_bench.session.tokenizer.token_bytes(stop).decode("utf-8", "ignore")
            if text.strip():
                cut = {"max_new_tokens": _CUT_TOKENS, "stop": [text], **sampling}
                runs.append(_run(polydraft_bench, f"{how}, stop string {text!r}", prompt, **cut))
        for read in (1, random.randint(2, 4)):
            cut = {"max_new_tokens": _CUT_TOKENS, "read": read, **sampling}
            runs.append(_run(polydraft_bench, f"{how}, cancelled after {read} chunks", prompt, **cut))
        # EOS at whatever place of a round it comes.
        for number, (asked, plain) in enumerate(polydraft_bench.ended_by_eos):
            cut = {**sampling, "ignore_eos": False, "max_new_tokens": len(plain.token_ids) + 8}
            runs.append(_run(polydraft_bench, f"{how}, prompt {number} that ends with EOS", asked, **cut))
    compared = expect_true_statistics(runs)
    reasons = [run.found.result.finish_reason for run in runs]
    polydraft_bench.numbers["ended_by"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    if not compared:
        unchecked(_UNCHECKED)


@check(scope="method", after=(*_AFTER, "test_statistics_equal_counts", "test_statistics_of_outputs_cut_short"))
def test_statistics_of_many_requests(polydraft_bench: Bench) -> None:
    """Thirty short requests, some plain, sampled or cancelled: each one's counts are its own.

    Proves: counters do not accumulate over requests, nor leak from the request before, cancelled ones included, nor
    between requests that run at the same time.
    A failure means: totals are read from counters of the engine that other requests move as well.
    Look at: when counters are reset, and the difference that is taken of those that cannot be.
    """
    random = polydraft_bench.random("many requests")
    settings = _greedy_and_sampled(polydraft_bench)
    asked: list[Prompt] = [[{"role": "user", "content": chat}] for chat in chats(polydraft_bench.suite.options.seed)]
    asked += [polydraft_bench.prompt(random.randint(4, 40), variant) for variant in range(8)]
    runs: list[Counted] = []
    for number in range(_REQUESTS):
        how, sampling = random.choice(settings)
        call: dict[str, Any] = {"max_new_tokens": random.randint(4, 12), **sampling}
        what = f"request {number} of {_REQUESTS}, {how}, {call['max_new_tokens']} tokens"
        if number % 5 == 2:
            call["read"] = random.randint(1, 2)
            what += ", cancelled"
        elif number % 7 == 5:
            call["speculate"] = "off"
            what += ", plain"
        runs.append(_run(polydraft_bench, what, random.choice(asked), **call))
    compared = expect_true_statistics(runs)
    prompts = [polydraft_bench.prompt(length, length) for length in (9, 14, 21, 30)]
    for number, result in enumerate(polydraft_bench.session.generate_many(prompts, **greedy_settings(20))):
        expect_agreement(result.stats, f"prompt {number} of {len(prompts)} in generate_many")
    if not compared:
        unchecked(_UNCHECKED)


def _greedy_and_sampled(bench: Bench) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings: greedy, and sampled where the backend claims a temperature."""
    found: list[tuple[str, dict[str, Any]]] = [("greedy", {"temperature": 0.0, "ignore_eos": True})]
    if "temperature" in bench.capabilities.sampling:
        found.append(("sampled", {"temperature": 0.8, "ignore_eos": True, **bench.seed(41)}))
    return found


def _run(bench: Bench, where: str, prompt: Prompt, **settings: Any) -> Counted:
    with logged(bench.session) as logs:
        found = streamed(bench.session, prompt, **settings)
    return Counted(where, found, logs[-1] if logs else None)
