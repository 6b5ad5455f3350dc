"""Speculation happens: drafts are made, of the right length, and some are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft_conformance.acceptance import floor_of, scored_speculation
from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import MODEL_KINDS, engine_of, expect, has_model_drafter
from polydraft_conformance.comparison import expect_same
from polydraft_conformance.counting import count_log, logged, wrapped_sequences
from polydraft_conformance.evidence import evidence, greedy_settings
from polydraft_conformance.noise import epsilon_of
from polydraft_conformance.scripted import ScriptedSequence
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from polydraft import Session

    from polydraft_conformance.evidence import Evidence
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite


@check(scope="case", after=("test_generates",))
def test_drafts_are_made(polydraft_evidence: Evidence) -> None:
    """The drafter is not silently off: drafts were verified."""
    speculation = polydraft_evidence.speculation
    if speculation.drafted is None:
        not_claimed("The engine reports no drafts.")
    expect(bool(speculation.drafted), "The drafter is silent: no draft token was verified in any generation.")


@check(scope="case", after=("test_generates", "test_drafts_are_made", "test_statistics_equal_counts"))
def test_rounds_draft_k_tokens(polydraft_case: Case, polydraft_evidence: Evidence) -> None:
    """A round drafts k tokens, the bonus token excluded: never more, and where there is room, no fewer."""
    k = polydraft_case.k
    counts = [counts for generation in polydraft_evidence.generations if (counts := generation.counts)]
    if counts:
        longest = max(count.longest for count in counts)
        source = "engine's steps"
    else:
        per_position = [
            generation.speculative.stats.accepted_per_position for generation in polydraft_evidence.generations
        ]
        if any(positions is None for positions in per_position):
            not_claimed("The engine does not report accepted drafts by position.")
        longest = max(len(positions or ()) for positions in per_position)
        source = "statistics"
    expect(longest <= k, f"k is off: {longest} tokens were drafted in one round (by the {source}), but k={k}.")
    expect(longest == k, f"k is off: at most {longest} tokens were drafted in a round (by the {source}), but k={k}.")


@check(scope="kind", after=("test_generates", "test_drafts_are_made"))
def test_rounds_end_with_a_bonus_token(polydraft_session: Session, polydraft_evidence: Evidence) -> None:
    """Every round adds the target's own token to its accepted drafts; only the last one may be cut."""
    prompt = polydraft_evidence.generations[1].prompt
    pieces = streamed(polydraft_session, list(prompt.token_ids), **greedy_settings(prompt.max_new_tokens))
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
def test_drafts_are_accepted(polydraft_evidence: Evidence, polydraft_numbers: dict[str, Any]) -> None:
    """Some drafts are accepted: speculation is of use, and comparisons with plain decoding show something."""
    speculation = polydraft_evidence.speculation
    polydraft_numbers["acceptance"] = {"prompts": "window", **speculation.as_numbers()}
    if speculation.accepted is None:
        not_claimed("The engine does not report accepted drafts.")
    expect(bool(speculation.accepted), f"Acceptance is 0: none of {speculation.drafted} draft tokens was accepted.")


@check(scope="target", after=("test_generates", "test_drafts_are_made", "test_drafts_are_accepted"))
def test_acceptance_reaches_its_floor(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_numbers: dict[str, Any]
) -> None:
    """On the prompts that the built-in pair was scored with, the mean acceptance length is within 10% of its score."""
    floor = floor_of(polydraft_case, quick=polydraft_suite.options.quick)
    if floor is None:
        not_claimed(
            f"No score is recorded for {polydraft_case.pair.name} with {polydraft_case.drafter}, k={polydraft_case.k}."
        )
    speculation = scored_speculation(polydraft_session, floor)
    found = speculation.mean_acceptance_length
    polydraft_numbers["acceptance"] = {"prompts": "scored", **speculation.as_numbers()}
    polydraft_numbers["floor"] = floor.mean_acceptance_length
    if found is None:
        not_claimed("The engine reports no acceptance.")
    expect(
        found >= floor.mean_acceptance_length,
        f"Acceptance is below its floor: the mean acceptance length is {found:.3f}; the pair's score is "
        f"{floor.score:.3f}, so at least {floor.mean_acceptance_length:.3f} was expected (k={polydraft_case.k}, "
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
def test_target_drafts_for_itself(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_numbers: dict[str, Any]
) -> None:
    """The target as its own drafter is always right, but for near ties: it drafts in steps of one token."""
    capabilities = polydraft_suite.capabilities
    if capabilities is None or "draft-model" not in capabilities.drafter_kinds:
        not_claimed("The backend does not claim the drafter kind draft-model.")
    case = polydraft_case.with_drafter(polydraft_case.pair.target, "draft-model")
    found = evidence(polydraft_suite, case)
    speculation = found.speculation
    polydraft_numbers["acceptance"] = {
        "prompts": "itself",
        **speculation.as_numbers(),
        "drafter": case.drafter,
        "kind": case.kind,
    }
    rate = speculation.acceptance_rate
    if rate is None or speculation.drafted is None or speculation.accepted is None:
        expect(speculation.accepted is None, "The target drafts nothing for itself.")
        not_claimed("The engine does not report accepted drafts.")
    least = _least_right(polydraft_suite, polydraft_case, found)
    if not speculation.counted:
        # A whole engine may draft beyond the end of the output: those tokens are not accepted.
        rate = speculation.accepted / max(speculation.accepted, speculation.drafted - case.k * len(found.generations))
    expect(
        rate >= least,
        f"The target as its own drafter is not always right: the acceptance rate is {rate:.4f}, not at least {least} "
        f"({speculation.accepted} of {speculation.drafted}). The drafter sees another context, position or KV cache.",
    )


@check(scope="kind", after=("test_generates", "test_greedy_equals_plain"), claims=has_model_drafter)
def test_wrong_drafts_change_nothing(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """With a drafter that is always wrong, nothing is accepted and the output is the plain one."""
    _run_script(polydraft_suite, polydraft_case, polydraft_session, lambda _round: 0)


@check(scope="kind", after=("test_generates", "test_greedy_equals_plain"), claims=has_model_drafter)
def test_any_number_of_drafts_is_accepted(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session
) -> None:
    """With 0, 1, .. k right drafts in turn, just these are accepted and the output is the plain one."""
    k = polydraft_case.k
    # 3 and k+1 have no common divisor for the usual k: every number is followed by every other in some order.
    _run_script(polydraft_suite, polydraft_case, polydraft_session, lambda number: (3 * number) % (k + 1))


def _run_script(suite: Suite, case: Case, session: Session, right: Any) -> None:
    """Decode with scripted drafts; compare output and acceptance with the script."""
    if case.kind not in MODEL_KINDS:
        not_claimed("n-gram drafts are the core's own.")
    engine = engine_of(session)
    for generation in evidence(suite, case).generations:
        plain = generation.plain
        truth = [*plain.prompt_token_ids, *plain.token_ids]
        scripts: list[ScriptedSequence] = []

        def wrap(inner: Any, truth: list[int] = truth, scripts: list[ScriptedSequence] = scripts) -> ScriptedSequence:
            scripts.append(ScriptedSequence(inner, truth, engine.tokenizer.vocab_size, right))
            return scripts[-1]

        with wrapped_sequences(engine, wrap), logged(session) as logs:
            result = session.generate(list(plain.prompt_token_ids), **greedy_settings(len(plain.token_ids)))
        place = generation.prompt.place
        if not expect_same(
            suite,
            case,
            session,
            plain.prompt_token_ids,
            plain.token_ids,
            result.token_ids,
            wrong=f"Drafts changed the output, prompt {place} (of the window).",
        ):
            continue  # behind a near tie the script's drafts are of another text
        assert logs
        counts = count_log(logs[-1], len(result.token_ids))
        wanted = scripts[-1].right
        expect(
            counts.drafted == scripts[-1].drafted, f"{scripts[-1].drafted} drafts were made, {counts.drafted} verified."
        )
        expect(
            counts.accepted == wanted,
            f"{wanted} drafts were right, but {counts.accepted} accepted (prompt {place} of the window).",
        )


def _least_right(suite: Suite, case: Case, found: Evidence) -> float:
    """The least share of right drafts: 1 where the engine's rows were measured not to depend on their step.

    Elsewhere a near tie may cost all drafts of its round, and in low precision there are some.
    """
    noise = suite.cache.get(("noise", case.pair))
    if noise is not None and noise.most == 0.0:
        return 1.0
    return 0.99 if epsilon_of(found.generations[0].plain.running.dtype) < 1e-5 else 0.85
