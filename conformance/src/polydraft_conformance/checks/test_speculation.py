"""Speculation happens: drafts are made, of the right length, and some are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.verification import epsilon_of

from polydraft_conformance.acceptance import floor_of, scored_speculation
from polydraft_conformance.bench import Bench
from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import expect, has_model_drafter
from polydraft_conformance.counting import count_log, logged, stepping_engine, wrapped_sequences
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.scripted import ScriptedSequence
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft.contract import EngineSequence


@check(scope="case", after=("test_generates",))
def test_drafts_are_made(polydraft_bench: Bench) -> None:
    """The drafter is not silently off: drafts were verified.

    Proves: Speculation is on: the target verified drafts.
    A failure means: The drafter never proposed anything, or its proposals are not counted.
    Look at: `EngineSequence.propose`, or `DraftModelSequence` in `open_sequence`; in a whole engine, how k and the
    drafter are passed on. With n-grams: whether the model's output repeats anything.
    """
    drafted = polydraft_bench.evidence.speculation.stats.num_draft_tokens
    if drafted is None:
        not_claimed("The engine reports no drafts.")
    expect(bool(drafted), "The drafter is silent: no draft token was verified in any generation.")


@check(scope="case", after=("test_generates", "test_drafts_are_made", "test_statistics_equal_counts"))
def test_rounds_draft_k_tokens(polydraft_bench: Bench) -> None:
    """A round drafts k tokens, the bonus token excluded: never more, and where there is room, no fewer.

    Proves: k means the same as everywhere in polydraft: drafts in one round, without the bonus token.
    A failure means: The engine counts the bonus token into k, or drafts fewer or more than asked for.
    Look at: How the plugin translates `num_speculative_tokens` to the engine's own count, and what it does with the `k`
    given to `propose`.
    """
    k = polydraft_bench.case.k
    speculation = polydraft_bench.evidence.speculation
    if speculation.stats.accepted_per_position is None:
        not_claimed("The engine does not report accepted drafts by position.")
    longest = len(speculation.stats.accepted_per_position)
    source = "engine's steps" if speculation.counted else "statistics"
    expect(longest <= k, f"k is off: {longest} tokens were drafted in one round (by the {source}), but k={k}.")
    expect(longest == k, f"k is off: at most {longest} tokens were drafted in a round (by the {source}), but k={k}.")


@check(scope="kind", after=("test_generates", "test_drafts_are_made"))
def test_rounds_end_with_a_bonus_token(polydraft_bench: Bench) -> None:
    """Every round adds the target's own token to its accepted drafts; only the last one may be cut.

    Proves: Each round emits one token of the target's own after its accepted drafts.
    A failure means: The target computed the token and the engine dropped it: one token a round is lost.
    Look at: The tokens that a whole engine passes to `Generation.emit`: accepted drafts first, the bonus token last.
    """
    prompt = polydraft_bench.evidence.runs[1].prompt
    pieces = streamed(polydraft_bench.session, list(prompt.token_ids), **greedy_settings(prompt.max_new_tokens))
    if all(chunk.num_accepted_tokens is None for chunk in pieces.chunks):
        not_claimed("The engine does not report accepted drafts.")
    for number, chunk in enumerate(pieces.chunks[:-1]):
        accepted = chunk.num_accepted_tokens or 0
        expect(
            not chunk.token_ids or len(chunk.token_ids) > accepted,
            f"The bonus token is missing: round {number} gave {len(chunk.token_ids)} tokens, all of them accepted "
            "drafts. The target's own token after them was computed and dropped.",
        )


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
        not_claimed("The engine does not report accepted drafts.")
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
        not_claimed("The engine reports no acceptance.")
    expect(
        found >= floor.mean_acceptance_length,
        f"Acceptance is below its floor: the mean acceptance length is {found:.3f}; the pair's score is "
        f"{floor.score:.3f}, so at least {floor.mean_acceptance_length:.3f} was expected (k={case.k}, "
        f"{len(floor.prompts)} prompts, {floor.new_tokens} tokens each).",
    )


@check(
    scope="target",
    after=(
        "test_generates",
        "test_near_ties_as_rare_as_in_control",
        "test_greedy_equals_plain",
        "test_drafts_are_made",
        "test_drafts_are_accepted",
    ),
    claims=has_model_drafter,
)
def test_target_drafts_for_itself(polydraft_bench: Bench) -> None:
    """The target as its own drafter is always right, but for near ties: it drafts in steps of one token.

    Proves: A drafter that computes what the target computes is always right: all its inputs are.
    A failure means: Even the target's own copy is rejected sometimes: the drafter sees another context, position or
    cache than the target.
    Look at: How the drafter catches up after a round: the newest token, and the last draft if all were accepted.
    """
    if "draft-model" not in polydraft_bench.capabilities.drafter_kinds:
        not_claimed("The backend does not claim the drafter kind draft-model.")
    suite, pair = polydraft_bench.suite, polydraft_bench.case.pair
    least = _least_right(polydraft_bench)  # before the next line closes this session
    case = polydraft_bench.case.with_drafter(pair.target, "draft-model")
    itself = Bench(suite, case, suite.session(case), polydraft_bench.numbers)
    found = itself.evidence
    speculation = found.speculation
    itself.numbers["acceptance"] = {
        "prompts": "itself",
        **speculation.as_numbers(),
        "drafter": case.drafter,
        "kind": case.kind,
    }
    drafted, accepted = speculation.stats.num_draft_tokens, speculation.stats.num_accepted_tokens
    rate = speculation.stats.acceptance_rate
    if rate is None or drafted is None or accepted is None:
        expect(accepted is None, "The target drafts nothing for itself.")
        not_claimed("The engine does not report accepted drafts.")
    if not speculation.counted:
        # A whole engine may draft beyond the end of the output: those tokens are not accepted.
        rate = accepted / max(accepted, drafted - case.k * len(found.runs))
    expect(
        rate >= least,
        f"The target as its own drafter is not always right: the acceptance rate is {rate:.4f}, not at least {least} "
        f"({accepted} of {drafted}). The drafter sees another context, position or KV cache.",
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


def _least_right(bench: Bench) -> float:
    """The least share of right drafts: 1 where the engine's rows were measured not to depend on their step.

    Elsewhere a near tie may cost all drafts of its round, and in low precision there are some.
    """
    if bench.capabilities.exposes_logits and stepping_engine(bench.session) and bench.noise.most == 0.0:
        return 1.0
    return 0.99 if epsilon_of(bench.session.running.dtype) < 1e-5 else 0.85
