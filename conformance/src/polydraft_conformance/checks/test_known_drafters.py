"""Drafters of which it is known how often they are right: acceptance must follow them."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft import SpeculationWarning
from polydraft.verification import MARGIN_LIMIT, epsilon_of, judge_outputs

from polydraft_conformance.bench import Bench
from polydraft_conformance.catalog import check, not_claimed, unchecked
from polydraft_conformance.claims import expect, has_model_drafter
from polydraft_conformance.counting import logged, stepping_engine
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.known_drafters import perfect_drafter, useless_drafter
from polydraft_conformance.ngram_rule import unseen_steps
from polydraft_conformance.streams import streamed
from polydraft_conformance.truth import Counted

if TYPE_CHECKING:
    from polydraft.contract import GenerationResult

    from polydraft_conformance.counting import SequenceLog
    from polydraft_conformance.streams import Streamed

_FEW_TOKENS = 64
"""Tokens of the output that a drafter without knowledge drafts for."""
_FAR_PROMPT = 340
"""Tokens of a long prompt."""
_COARSE = 0.85
"""The least share of right drafts in low precision."""
_NEAR_TIES = 2
"""Near ties that a long output may have in float32."""
_MANY = 30
"""Of so many right drafts of a model, some are steps that the text has not seen before."""


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
    """The target as its own drafter is always right, but for near ties, in short outputs and at far positions.

    Proves: the drafter sees the tokens, positions and KV cache that the target sees, up to hundreds of tokens. Where
    rows do not depend on their step, each rejected draft is looked at: in float32 there is none, in lower precision it
    and the target's choice are nearly tied.
    A failure means: its context is shifted or cut, it is left behind after a rejection, or acceptance is not counted.
    Look at: the position and the tokens that the draft model runs, its cache after a rollback, and its window.
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
        expect(not accepted and drafted is None, "The target drafts nothing for itself.")
        unchecked("The engine does not report accepted drafts.")
    if not speculation.counted:
        # A whole engine may draft beyond the end of the output: those tokens are not accepted.
        rate = accepted / max(accepted, drafted - case.k * len(found.runs))
    near_ties = least == 1.0 > rate >= _COARSE and not itself.is_fine
    if near_ties and not any(run.log is None or _wrong_rounds(itself, run.speculative, run.log) for run in found.runs):
        itself.numbers["rejected_near_ties"] = drafted - accepted
        least = _COARSE
    expect(
        rate >= least,
        f"The target as its own drafter is not always right: the acceptance rate is {rate:.4f}, not at least {least} "
        f"({accepted} of {drafted}). The drafter sees another context, position or KV cache.",
    )
    if not itself.quick:
        long = itself.long_run
        _expect_right_to_the_end(itself, long.streamed, long.log, "The target as its own drafter")
    elif suite.pairs[0] == pair:  # a long output takes seconds: only its end
        length = min(_FAR_PROMPT, itself.session.running.context_length - 2 * _FEW_TOKENS)
        prompt = itself.prompt(max(2, length), variant=7)
        with logged(itself.session) as logs:
            far = streamed(itself.session, prompt, **greedy_settings(_FEW_TOKENS))
        _expect_right_to_the_end(itself, far, logs[-1] if logs else None, "The target as its own drafter")


@check(
    scope="method",
    after=(
        "test_rounds_draft_k_tokens",
        "test_statistics_equal_counts",
        "test_greedy_equals_plain",
        "test_drafts_are_accepted",
    ),
    claims=has_model_drafter,
)
def test_right_drafts_are_accepted(polydraft_bench: Bench) -> None:
    """A drafter that is always right has all of its drafts accepted, up to a context of hundreds of tokens.

    Proves: every right draft is counted as accepted, and the drafter sees the target's context at far positions.
    A failure means: its context is shifted or cut, it is left behind after a rejection, or acceptance is not counted.
    Look at: the position, the hidden state and the keys and values that the drafter is given.
    """
    bench = polydraft_bench
    bench.need_model_drafter()
    suite, own = bench.suite, bench.long_run.streamed
    with tempfile.TemporaryDirectory() as folder:
        case = perfect_drafter(suite, bench.case, Path(folder) / f"{bench.case.pair.name}-perfect")
        if case is None:
            not_claimed("No drafter of this kind is always right; the target drafts for itself in another check.")
        perfect = Bench(suite, case, suite.session(case), bench.numbers)
        try:
            found = perfect.long_run.streamed
            same = [one.accepted for one in own.rounds] == [one.accepted for one in found.rounds]
            who, log = "A drafter that is always right", perfect.long_run.log
            _expect_right_to_the_end(perfect, found, log, who, same_as_own=same)
        finally:
            suite.close()


@check(
    scope="method",
    after=(
        "test_right_drafts_are_accepted",
        "test_target_drafts_for_itself",
        "test_statistics_of_many_requests",
        "test_every_request_drafts_k_tokens",
    ),
    claims=has_model_drafter,
)
def test_useless_drafts_are_not_accepted(polydraft_bench: Bench) -> None:
    """With a drafter that knows nothing, hardly a draft is accepted, and the output is the plain one.

    Proves: acceptance is measured: it falls when the drafter is replaced by a copy whose weights are all 0 (or, of the
    toy models, by one that is never right).
    A failure means: the statistics are made up, or another drafter than the one that was loaded makes the drafts.
    Look at: where accepted tokens are counted; whether n-grams, or an earlier drafter, take the model's place.
    """
    bench = polydraft_bench
    bench.need_model_drafter()
    long, suite = bench.long_run, bench.suite
    with tempfile.TemporaryDirectory() as folder:
        useless = useless_drafter(suite, bench.case, Path(folder) / f"{bench.case.pair.name}-useless")
        if useless is None:
            unchecked(
                "A drafter without knowledge can be made of safetensors files of moderate size and toy models only."
            )
        tokens = len(long.streamed.token_ids) if useless.share else min(_FEW_TOKENS, len(long.streamed.token_ids))
        exact = _least_right(bench) == 1.0  # before the next session closes this one
        own = sum(one.accepted or 0 for one in long.streamed.rounds if one.before < tokens)
        other = Bench(suite, useless.case, suite.session(useless.case), bench.numbers)
        try:
            with logged(other.session) as logs, warnings.catch_warnings():
                warnings.simplefilter("ignore", SpeculationWarning)
                found = streamed(other.session, list(long.plain.prompt_token_ids), **greedy_settings(tokens))
            other.same(long.plain, found.result, wrong="A useless drafter changed the output.", length=tokens)
        finally:
            suite.close()  # before its folder goes
    truths = Counted("a useless drafter", found, logs[-1] if logs else None).truths
    stats = truths[0][1] if truths else found.result.stats
    drafted, accepted = stats.num_draft_tokens, stats.num_accepted_tokens
    if accepted is None:
        unchecked("The engine does not report accepted drafts.")
    most = useless.most(found.token_ids, own, exact=exact)
    bench.numbers["useless"] = {"drafted": drafted, "accepted": accepted, "most": most, "accepted_of_own": own}
    expect(
        accepted <= most,
        f"Acceptance does not depend on the drafter: with a drafter {useless.what}, {accepted} of {drafted} drafts are "
        f"reported as accepted, where at most {most} can be right (with its own drafter {own}). The statistics are "
        "made up, or another drafter makes the drafts.",
    )


def _expect_right_to_the_end(
    bench: Bench, found: Streamed, log: SequenceLog | None, who: str, *, same_as_own: bool = False
) -> None:
    """All drafts of a long output are accepted, but for near ties; the message says from where on they are not.

    Args:
        bench: Of the session with this drafter.
        found: The output.
        log: The engine's calls; None for a whole engine.
        who: The drafter, for messages.
        same_as_own: Whether the case's own drafter had the same drafts accepted in every round.
    """
    # The last round's drafts may lie past the end.
    rounds = [one for one in found.rounds[:-1] if one.drafted]
    if any(one.drafted is None or one.accepted is None for one in found.rounds):
        unchecked("The engine does not report accepted drafts by round.")
    expect(bool(rounds), f"{who} drafts nothing.")
    wrong = [one for one in rounds if (one.accepted or 0) < (one.drafted or 0)]
    least = _least_right(bench)
    many = 3 + 2 * len(rounds) // 3
    allowed = 0 if least == 1.0 else _NEAR_TIES if least > 0.9 else many
    prompt = len(found.result.prompt_token_ids)
    bench.numbers["long"] = {"rounds": len(rounds), "rejecting": len(wrong), "allowed": allowed}
    if len(wrong) <= allowed:
        return
    if least == 1.0 and log is not None and not bench.is_fine and len(wrong) <= many:
        ends = _wrong_rounds(bench, found.result, log)
        wrong = [one for one in wrong if one.before + (one.accepted or 0) in ends]
        if not wrong:
            return
    drafted, accepted = (sum(getattr(one, name) or 0 for one in rounds) for name in ("drafted", "accepted"))
    text = [*found.result.prompt_token_ids, *found.token_ids]
    unseen = sum(unseen_steps(text, prompt + one.before, one.accepted or 0) for one in rounds)
    if accepted > _MANY and not unseen:
        raise AssertionError(
            f"N-grams are drafted in place of the model: {who.lower()} has {accepted} of {drafted} drafts accepted, "
            "and each of them followed its predecessor earlier in the text."
        )
    if same_as_own:
        raise AssertionError(
            f"Acceptance does not depend on the drafter: {accepted} of {drafted} drafts are accepted with a drafter "
            "that is always right, round by round the same as with the pair's own. The statistics are made up, or "
            "another drafter than the one that was loaded makes the drafts."
        )
    first = wrong[0]
    before = sum(one.before < first.before for one in rounds)
    after = len(rounds) - before
    raise AssertionError(
        f"{who} is wrong from a context of {prompt + first.before} tokens on: {len(wrong)} of the {after} rounds from "
        f"there reject a draft, none of the {before} before does. The drafter sees another context, position or KV "
        f"cache there (prompt of {prompt} tokens, sliding window {bench.window})."
    )


def _least_right(bench: Bench) -> float:
    """The least share of right drafts: 1 where the engine's rows were measured not to depend on their step.

    Elsewhere a near tie may cost all drafts of its round, and in low precision there are some.
    """
    if bench.capabilities.exposes_logits and stepping_engine(bench.session) and bench.noise.most == 0.0:
        return 1.0
    return 0.99 if bench.is_fine else _COARSE


def _wrong_rounds(bench: Bench, result: GenerationResult, log: SequenceLog) -> list[int]:
    """Output tokens at which a draft was rejected that was not nearly tied with the target's choice.

    The drafter's steps are not the control's, so that the control flips, too, is not asked for: the output is the same.
    An engine whose ways agree bit by bit on short contexts may differ by a rounding elsewhere.
    """
    wrong, output, at = [], result.token_ids, len(log.first)
    rounding = max(bench.noise.most, epsilon_of(bench.session.running.precision) * bench.noise.largest_logit)
    for run, chosen in log.steps:
        right = 0
        while right < len(run) - 1 and run[1 + right] == chosen[right]:
            right += 1
        place = at + right
        at = place + 1
        if right == len(run) - 1 or place >= len(output):
            continue
        other = (*output[:place], run[1 + right])
        tie = judge_outputs(
            bench.session, bench.capabilities, result.prompt_token_ids, result.settings, output, other
        ).tie
        if tie is None or tie.margin is None or abs(tie.margin) > MARGIN_LIMIT * max(rounding, tie.noise or 0.0):
            wrong.append(place)
    return wrong
