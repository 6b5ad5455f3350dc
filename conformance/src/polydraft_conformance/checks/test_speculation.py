"""Speculation happens: drafts are made, of the right length, and some are accepted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polydraft_conformance.acceptance import floor_of, scored_speculation
from polydraft_conformance.catalog import check, not_claimed, unchecked
from polydraft_conformance.claims import MODEL_KINDS, expect, has_model_drafter
from polydraft_conformance.counting import count_log, logged, stepping_engine, wrapped_sequences
from polydraft_conformance.draft_counts import draft_counts, expect_full_drafts, short_drafts
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.ngram_rule import continues, ngram_drafts, repeats, unseen_steps
from polydraft_conformance.scripted import ScriptedSequence
from polydraft_conformance.streams import streamed
from polydraft_conformance.truth import expect_sound_rounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft.contract import EngineSequence

    from polydraft_conformance.bench import Bench
    from polydraft_conformance.counting import SequenceLog
    from polydraft_conformance.streams import Streamed

_LONG_PROMPT = 420
"""Tokens of a long prompt."""


@check(scope="case", after=("test_generates",))
def test_drafts_are_made(polydraft_bench: Bench) -> None:
    """The drafter is not silently off: drafts were verified.

    Proves: speculation takes place at all.
    A failure means: the drafter is loaded and never asked, or its proposals are dropped.
    Look at: ``propose``, and the conditions under which the engine skips it.
    """
    drafted = polydraft_bench.evidence.speculation.stats.num_draft_tokens
    if drafted is None:
        unchecked("The engine reports no drafts.")
    if not drafted and not _sure_drafts(polydraft_bench, repeats):
        not_claimed("No n-gram of these texts occurs twice: there is nothing to draft.")
    expect(bool(drafted), "The drafter is silent: no draft token was verified in any generation.")


@check(scope="case", after=("test_generates", "test_drafts_are_made", "test_statistics_equal_counts"))
def test_rounds_draft_k_tokens(polydraft_bench: Bench) -> None:
    """Every round drafts k tokens, the bonus token excluded: never more, and where there is room, no fewer.

    Proves: k is what was asked for, in each round of three outputs around the sliding window.
    A failure means: k counts the bonus token, or is lowered in some rounds.
    Look at: how k is handed to the engine, and what shortens a draft.
    """
    k = polydraft_bench.case.k
    counted = [draft_counts(run.streamed, run.log, k) for run in polydraft_bench.evidence.runs]
    if polydraft_bench.case.kind in MODEL_KINDS and None not in counted:
        every = [count for counts in counted for count in counts or ()]
        if short_drafts(every, k):
            _expect_drafts_after_the_first_request(polydraft_bench)
        expect_full_drafts(every, k, f"{len(counted)} prompts around the window")
        return
    speculation = polydraft_bench.evidence.speculation
    if polydraft_bench.case.kind not in MODEL_KINDS:
        for run in polydraft_bench.evidence.runs:
            _expect_ngrams(run.streamed, run.log, k, f"prompt {run.prompt.place} of the window")
        return
    if speculation.stats.accepted_per_position is None:
        unchecked("The engine reports neither drafts by round nor accepted drafts by position.")
    longest = len(speculation.stats.accepted_per_position)
    source = "engine's steps" if speculation.counted else "statistics"
    expect(longest <= k, f"k is off: {longest} tokens were drafted in one round (by the {source}), but k={k}.")
    expect(longest == k, f"k is off: at most {longest} tokens were drafted in a round (by the {source}), but k={k}.")


def _expect_drafts_after_the_first_request(bench: Bench) -> None:
    """Repeat one request in a new session: whether it is the number of requests that ends drafting."""
    request = bench.evidence.runs[-1].speculative
    prompt, settings = list(request.prompt_token_ids), greedy_settings(len(request.token_ids))
    with bench.opened() as fresh:
        drafted = [fresh.session.generate(prompt, **settings).stats.num_draft_tokens or 0 for _ in range(9)]
    expect(
        min(drafted) >= drafted[0] // 2,
        "Only the first requests of a session are drafted for: the same request, made nine times in a new session, "
        f"drafts {drafted} tokens.",
    )


@check(scope="method", after=("test_generates", "test_rounds_draft_k_tokens", "test_greedy_equals_plain"))
def test_long_outputs_draft_k_tokens(polydraft_bench: Bench) -> None:
    """Drafting goes on to the end: every round of an output of hundreds of tokens, and after a long prompt, drafts k.

    Proves: neither the length of the output nor that of the context lowers k.
    A failure means: drafting stops after some tokens, above some context, or in some of the rounds.
    Look at: limits of the drafter's cache, of its context, and of counters; what is done after a rejection.
    """
    bench, k = polydraft_bench, polydraft_bench.case.k
    long = bench.long_run
    with logged(bench.session) as logs:
        settings = greedy_settings(6 * k)
        length = max(2, min(_LONG_PROMPT, bench.session.running.context_length - 8 * k))
        far = streamed(bench.session, bench.prompt(length, variant=5), **settings)
    runs = [
        (
            f"{long.prompt_length} tokens of prompt and {len(long.streamed.token_ids)} of output",
            long.streamed,
            long.log,
        ),
        (f"{length} tokens of prompt and {len(far.token_ids)} of output", far, logs[-1] if logs else None),
    ]
    if bench.case.kind not in MODEL_KINDS:
        for where, found, log in runs:
            _expect_ngrams(found, log, k, where)
        return
    counts = [draft_counts(found, log, k) for _, found, log in runs]
    if None in counts:
        unchecked("The engine does not report how many tokens it drafted in each round.")
    context_stops = bool(short_drafts(counts[1] or (), k))
    for (where, *_), of_run in zip(runs, counts, strict=True):
        expect_full_drafts(of_run or (), k, where, by_context=context_stops)
    bench.numbers["rounds"] = sum(len(of_run or ()) for of_run in counts)


@check(scope="method", after=("test_generates", "test_rounds_draft_k_tokens", "test_long_outputs_draft_k_tokens"))
def test_every_request_drafts_k_tokens(polydraft_bench: Bench) -> None:
    """Drafting does not depend on the request: k is drafted with every claimed setting, and after any other request.

    Proves: the drafter is on for sampled requests, with each setting that the backend claims, with log-probabilities,
    for the second request, after a cancelled one and after a plain one.
    A failure means: a setting or an earlier request turns drafting off, and nothing says so.
    Look at: conditions on the request before ``propose``; a declared ``speculation_conflict`` is no failure.
    """
    bench, k = polydraft_bench, polydraft_bench.case.k
    prompt = bench.prompt(2 * k + 20, variant=1)
    # Room for two full rounds; near the end of a whole engine's output it is not known.
    tokens = 2 * k + 2 if stepping_engine(bench.session) else 4 * k
    off: list[str] = []
    for name, settings in _requests(bench):
        with logged(bench.session) as logs:
            found = streamed(bench.session, prompt, **{**greedy_settings(tokens), **settings})
        if found.result.speculation_off is not None:
            off.append(name)
            continue
        if "read" in settings or settings.get("speculate") == "off":
            continue
        if bench.case.kind not in MODEL_KINDS:
            _expect_ngrams(found, logs[-1] if logs else None, k, name)
            continue
        counts = draft_counts(found, logs[-1] if logs else None, k)
        if counts is None:
            unchecked("The engine does not report how many tokens it drafted in each round.")
        expect_full_drafts(counts, k, name)
    bench.numbers["speculation_off"] = [name for name in off if "plain" not in name]


@check(scope="kind", after=("test_generates", "test_drafts_are_made"))
def test_rounds_end_with_a_bonus_token(polydraft_bench: Bench) -> None:
    """Every round adds the target's own token to its accepted drafts; only the last one may be cut.

    Proves: a round of n accepted drafts gives n + 1 tokens, so no token of the target is lost, and none is counted as
    a draft.
    A failure means: the bonus token is dropped, or counted as an accepted draft.
    Look at: the tokens and ``num_accepted_tokens`` given to ``Generation.emit``.
    """
    runs = polydraft_bench.evidence.runs
    expect_sound_rounds([(f"prompt {run.prompt.place} of the window", run.streamed) for run in runs])
    if all(one.accepted is None for run in runs for one in run.streamed.rounds):
        unchecked("The engine does not report accepted drafts by round.")


@check(scope="case", after=("test_generates", "test_drafts_are_made", "test_greedy_equals_plain"))
def test_drafts_are_accepted(polydraft_bench: Bench) -> None:
    """Some drafts are accepted: speculation is of use, and comparisons with plain decoding prove something.

    Proves: Some drafts are right, so that comparisons with plain decoding are about accepted drafts.
    A failure means: None was: the drafter is at a wrong position or sees another context, or acceptance is not counted.
    Look at: The position of the first draft (`length + 1`), whether the newest token is run before it, and that the
    newest token itself is not returned as a draft. For a model that was not made for this target, choose another
    drafter.
    """
    speculation = polydraft_bench.evidence.speculation
    polydraft_bench.numbers["acceptance"] = {"prompts": "window", **speculation.as_numbers()}
    drafted, accepted = speculation.stats.num_draft_tokens, speculation.stats.num_accepted_tokens
    if accepted is None:
        unchecked("The engine does not report accepted drafts.")
    if not accepted and not _sure_drafts(polydraft_bench, continues):
        not_claimed(
            "No n-gram of these texts is sure to be continued as before: that no draft is right proves nothing."
        )
    expect(bool(accepted), f"Acceptance is 0: none of {drafted} draft tokens was accepted.")


@check(scope="target", after=("test_generates", "test_drafts_are_made", "test_drafts_are_accepted"))
def test_acceptance_reaches_its_floor(polydraft_bench: Bench) -> None:
    """On the prompts that the built-in pair was scored with, the mean acceptance length is within 10% of its score.

    Proves: The drafter is as good as it was when the pair was made: a fault that costs only acceptance is found.
    A failure means: The mean acceptance length is below the recorded score, by more than the margin.
    Look at: The drafter's position, its inputs, its dtype and quantization. Compare with
    `test_drafter_logits_equal_reference`.
    """
    case = polydraft_bench.case
    floor = floor_of(case, quick=polydraft_bench.quick)
    if floor is None:
        not_claimed(f"No score is recorded for {case.pair.name} with {case.drafter}, k={case.k}.")
    speculation = scored_speculation(polydraft_bench.session, floor)
    found = speculation.stats.mean_acceptance_length
    polydraft_bench.numbers["acceptance"] = {"prompts": "scored", **speculation.as_numbers()}
    polydraft_bench.numbers["floor"] = floor.mean_acceptance_length
    if found is None:
        unchecked("The engine reports no acceptance.")
    expect(
        found >= floor.mean_acceptance_length,
        f"Acceptance is below its floor: the mean acceptance length is {found:.3f}; the pair's score is "
        f"{floor.score:.3f}, so at least {floor.mean_acceptance_length:.3f} was expected (k={case.k}, "
        f"{len(floor.prompts)} prompts, {floor.new_tokens} tokens each).",
    )


@check(scope="kind", after=("test_generates", "test_greedy_equals_plain"), claims=has_model_drafter)
def test_wrong_drafts_change_nothing(polydraft_bench: Bench) -> None:
    """With a drafter that is always wrong, nothing is accepted and the output is the plain one.

    Proves: Drafts that are always wrong leave no trace in the output.
    A failure means: A wrong draft was accepted, or its rows are still seen after the rollback.
    Look at: `EngineSequence.verify`, which compares nothing itself, and `rollback`.
    """
    _run_script(polydraft_bench, lambda _round: 0)


@check(scope="kind", after=("test_generates", "test_greedy_equals_plain"), claims=has_model_drafter)
def test_any_number_of_drafts_is_accepted(polydraft_bench: Bench) -> None:
    """With 0, 1, .. k right drafts in turn, just these are accepted and the output is the plain one.

    Proves: After 0, 1, .. k accepted drafts the state is the right one, in every order.
    A failure means: A round that accepts the number in the message leaves a wrong state. Often it is all of them, or
    none.
    Look at: `EngineSequence.rollback` to `length before + 1 + accepted`, which is a rollback of nothing if all were
    accepted.
    """
    k = polydraft_bench.case.k
    # 3 and k+1 have no common divisor for the usual k: every number is followed by every other in some order.
    _run_script(polydraft_bench, lambda number: (3 * number) % (k + 1))


def _requests(bench: Bench) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of requests: one of each kind that may turn drafting off, each followed by another one."""
    vocabulary, seed = bench.session.tokenizer.vocab_size, bench.seed(51)
    some = bench.random("requests").sample(range(vocabulary // 2), 3)
    values: dict[str, Any] = {"top_p": 0.9, "top_k": 20, "min_p": 0.02, "typical_p": 0.9, "logprobs": 2}
    values |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2, "min_new_tokens": 8}
    values |= {"logit_bias": dict.fromkeys(some, -1.0), "banned_token_ids": some, "forced_token_ids": {2: some[0]}}
    claimed = bench.capabilities.sampling
    temperatures = [0.3, 1.0, 1.6] if "temperature" in claimed else []
    sampled = {"temperature": 0.7, **seed} if temperatures else {}
    found = [
        ("a greedy request", {}),
        ("the same request again", {}),
        *((f"a request with temperature {one}", {"temperature": one, **seed}) for one in temperatures),
        ("a greedy request after a sampled one", {}),
        *((f"a request with {name}", {**sampled, name: values[name]}) for name in values if name in claimed),
        ("a cancelled request", {"read": 2}),
        ("a request after a cancelled one", {}),
        ("a plain request", {"speculate": "off"}),
        ("a request after a plain one", {}),
        ("a request after one that a stop id ended", {}),
    ]
    return [(name, settings) for name, settings in found if bench.takes(settings)]


def _sure_drafts(bench: Bench, sure: Callable[[list[int], int], bool]) -> float:
    """In how many rounds of the greedy outputs ``sure(text, length)`` holds; with a model drafter, in all of them."""
    if bench.case.kind in MODEL_KINDS:
        return math.inf
    count = 0
    for run in bench.evidence.runs:
        text, prompt = [*run.speculative.prompt_token_ids, *run.speculative.token_ids], len(run.prompt.token_ids)
        # The last two rounds have no room.
        count += sum(sure(text, prompt + one.before) for one in run.streamed.rounds[1:-2])
    return count


def _expect_ngrams(found: Streamed, log: SequenceLog | None, k: int, where: str) -> None:
    """N-gram drafts are those of the core's rule (stepping engines), or at least those of a look-up in the text."""
    text = [*found.result.prompt_token_ids, *found.token_ids]
    prompt, total = len(found.result.prompt_token_ids), len(found.token_ids)
    if log is not None:
        for (run, _), one in zip(log.steps, found.rounds[1:], strict=False):
            wanted = ngram_drafts(text[: prompt + one.before], min(k, total - one.before - 1))
            expect(
                run[1:] == wanted,
                f"N-gram drafting is off after {one.before} output tokens, at a context of {prompt + one.before} "
                f"tokens: {run[1:]} is drafted, but {wanted or 'nothing'} followed the text's last n-gram before "
                f"({where}, k={k}).",
            )
        return
    missed = []
    for one in found.rounds[1:]:
        if one.drafted is None or one.accepted is None:
            unchecked("The engine does not report how many tokens it drafted in each round.")
        expect(one.drafted <= k, f"k is off: {one.drafted} tokens were drafted in one round, but k={k} ({where}).")
        unseen = unseen_steps(text, prompt + one.before, min(one.accepted, one.tokens))
        expect(
            unseen == 0,
            f"The accepted drafts are not n-grams: after {one.before} output tokens {one.accepted} drafts are reported "
            f"as accepted, and {unseen} of them never followed their predecessor in the text ({where}). The counts are "
            "made up, or another drafter runs.",
        )
        if total - one.before > 2 * k and repeats(text, prompt + one.before):
            missed.append(one.drafted == 0)
    expect(
        2 * sum(missed) <= len(missed),
        f"N-gram drafting is off: in {sum(missed)} of {len(missed)} rounds nothing is drafted, though the text's last "
        f"tokens occurred before ({where}).",
    )


def _run_script(bench: Bench, right: Callable[[int], int]) -> None:
    """Decode with scripted drafts; compare output and acceptance with the script."""
    bench.need_model_drafter()
    engine = bench.engine
    for run in bench.evidence.runs:
        plain = run.plain
        truth = [*plain.prompt_token_ids, *plain.token_ids]
        scripts: list[ScriptedSequence] = []

        def wrap(
            inner: EngineSequence, truth: list[int] = truth, scripts: list[ScriptedSequence] = scripts
        ) -> ScriptedSequence:
            scripts.append(ScriptedSequence(inner, truth, engine.tokenizer.vocab_size, right))
            return scripts[-1]

        with wrapped_sequences(engine, wrap), logged(bench.session) as logs:
            result = bench.session.generate(list(plain.prompt_token_ids), **greedy_settings(len(plain.token_ids)))
        place = run.prompt.place
        if not bench.same(plain, result, wrong=f"Drafts changed the output, prompt {place} (of the window)."):
            continue  # after a near tie the script's drafts belong to another text
        assert logs
        counts, script = count_log(logs[-1], len(result.token_ids)), scripts[-1]
        expect(
            counts.num_draft_tokens == script.drafted,
            f"{script.drafted} drafts were made, {counts.num_draft_tokens} verified.",
        )
        expect(
            counts.num_accepted_tokens == script.right,
            f"{script.right} drafts were right, but {counts.num_accepted_tokens} accepted (prompt {place} of the "
            "window).",
        )
