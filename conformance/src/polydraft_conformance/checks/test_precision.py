"""The other precision: a run in float32 looks at the 16-bit dtype as well, and the other way round."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.verification import first_difference, judge_outputs

import polydraft_conformance.checks.test_primitives as primitive_checks
from polydraft_conformance.bench import Bench
from polydraft_conformance.catalog import CHECKS, check, not_claimed
from polydraft_conformance.claims import MODEL_KINDS, expect
from polydraft_conformance.control import chance_of_at_least, flip_shares
from polydraft_conformance.counting import stepping_engine
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.signals import NotClaimed, NotIndependentlyChecked

if TYPE_CHECKING:
    from polydraft.contract import GenerationResult
    from polydraft.verification import Judgement

_SIXTEEN_BITS = ("bfloat16", "float16")
_PRIMITIVES = (
    primitive_checks.test_rows_equal_single_steps,
    primitive_checks.test_steps_equal_prefill,
    primitive_checks.test_rollback_is_exact,
)
_FALSE_ALARM = 1e-8
"""Probability that an engine whose near ties are as frequent as the control's fails for having more."""
_LEAST_SHARE = 0.3
"""Acceptance in the other precision is at least this share of the usual one."""
_BY_CHANCE = 0.2
"""Share of tokens that may be nearly tied in 16 bits, where nothing measures how many are: some ten times what built-in
models have."""
_APART = 1.0
"""Nats between two tokens whose order rounding to 16 bits may change, where an engine shows log-probabilities only."""


@check(
    scope="once",
    after=(
        *("test_generates", "test_rows_equal_single_steps", "test_steps_equal_prefill", "test_rollback_is_exact"),
        *("test_greedy_equals_plain", "test_drafts_are_accepted"),
    ),
    time_factor=6,
)
def test_the_other_precision(polydraft_bench: Bench) -> None:
    """In the other precision, too, speculation changes nothing but near ties, and drafts are accepted.

    Proves: a session in bfloat16 (float16 where that is refused; float32 if the run itself is in 16 bits) has right
    primitives, gives the plain tokens, greedy and by a seed, up to near ties as rare as blocks without a drafter have
    them, and accepts drafts.
    A failure means: what is wrong exists in this dtype only: a kernel, a KV cache of another dtype, a conversion of
    logits, a drafter in another precision than its target.
    Look at: casts between target, drafter, KV cache and sampler.
    """
    usual = polydraft_bench.suite.options.dtype
    refused: dict[str, str] = {}
    for dtype in ("float32",) if usual in _SIXTEEN_BITS else _SIXTEEN_BITS:
        suite = polydraft_bench.suite.in_dtype(dtype)
        try:
            session = suite.load(polydraft_bench.case)
        except (UnsupportedError, InvalidRequestError) as error:
            refused[dtype] = str(error)
            continue
        with closing(session):
            bench = Bench(suite, polydraft_bench.case, session, polydraft_bench.numbers)
            running = session.running.dtype
            expect(dtype in running, f"dtype={dtype!r} was asked for, but session.running says {running!r}.")
            try:
                _check(bench, polydraft_bench.evidence.speculation.stats.acceptance_rate)
            except AssertionError as error:
                raise AssertionError(f"In {dtype} only: {error}") from error
            finally:
                polydraft_bench.suite.verdicts += suite.verdicts
        return
    polydraft_bench.numbers["refused"] = refused
    not_claimed("; ".join(f"{dtype} is refused: {reason}" for dtype, reason in refused.items()))


def _check(bench: Bench, usual_rate: float | None) -> None:
    """All that is looked at in the other precision; ``usual_rate`` is the acceptance rate in the run's own."""
    # What the others look for changes the output as well: a quick run relies on that.
    for primitive in _PRIMITIVES[:1] if bench.quick else _PRIMITIVES:
        declared = CHECKS[primitive.__name__]
        if declared.claims is not None and declared.claims(bench.capabilities):
            continue
        try:
            primitive(bench)
        except (NotClaimed, NotIndependentlyChecked):  # rounding may hide what is looked for
            continue
        except AssertionError:
            if bench.suite.exclusions.find(primitive.__name__, bench.case) is None:
                raise
    runs: list[tuple[str, GenerationResult, GenerationResult, dict[str, Any]]] = []
    for run in bench.evidence.runs:
        runs.append((f"greedy, prompt {run.prompt.place} (of the window)", run.plain, run.speculative, {}))
        expect(
            len(run.speculative.token_ids) == run.prompt.max_new_tokens,
            f"a speculative output has {len(run.speculative.token_ids)} tokens, not {run.prompt.max_new_tokens}.",
        )
    if bench.capabilities.seed_identical and {"temperature", "seed"} <= bench.capabilities.sampling:
        prompt = bench.prompt(max(2, bench.window - 4), 1)
        sampled = {"temperature": 1.0, "seed": bench.seed_of(81)}
        settings = {**greedy_settings(24), **sampled}
        plain, found = bench.plain(prompt, **settings), bench.session.generate(prompt, **settings)
        runs.append((f"sampled with seed {sampled['seed']}", plain, found, sampled))
    near_ties = sum(_near_ties(bench, *run) for run in runs)
    tokens = sum(len(plain.token_ids) for _, plain, *_ in runs)
    bench.numbers["near_ties"] = {"found": near_ties, "tokens": tokens}
    if near_ties:
        shares = [share for _, plain, _, settings in runs for share in _shares(bench, plain, settings)]
        chance = chance_of_at_least(near_ties, shares)
        expect(
            chance >= _FALSE_ALARM,
            f"near ties are too frequent: {near_ties} in {tokens} tokens, where {sum(shares):.2f} are expected without "
            f"a drafter (probability {chance:.2g}). The target computes something else while speculating.",
        )
    speculation = bench.evidence.speculation
    bench.numbers["acceptance"] = {"prompts": "window, other precision", **speculation.as_numbers()}
    drafted, accepted = speculation.stats.num_draft_tokens, speculation.stats.num_accepted_tokens
    if accepted is None or drafted is None or usual_rate is None or bench.case.kind not in MODEL_KINDS:
        return
    chance = 1.0 - chance_of_at_least(accepted + 1, [_LEAST_SHARE * usual_rate] * drafted)
    expect(
        chance >= _FALSE_ALARM,
        f"few drafts are accepted: {accepted} of {drafted}, where the usual precision accepts {usual_rate:.0%} "
        f"(probability {chance:.2g} for a third of that rate).",
    )


def _shares(bench: Bench, plain: GenerationResult, settings: dict[str, Any]) -> list[float]:
    """For each token of a plain output, the probability that it is nearly tied."""
    if stepping_engine(bench.session) is None or settings:
        return [_BY_CHANCE] * len(plain.token_ids)
    return flip_shares(bench.engine, plain.prompt_token_ids, plain.token_ids, bench.k + 1)


def _near_ties(
    bench: Bench, name: str, plain: GenerationResult, result: GenerationResult, settings: dict[str, Any]
) -> int:
    """Near ties along a plain output: after each one, speculation starts again from the plain text.

    Raises:
        AssertionError: Something else than a near tie differs.
    """
    found, start = 0, 0
    while True:
        context, rest = (*plain.prompt_token_ids, *plain.token_ids[:start]), plain.token_ids[start:]
        from_here = plain.model_copy(update={"prompt_token_ids": context, "token_ids": rest})
        position = first_difference(rest, result.token_ids)
        if position is None:
            return found
        judgement = judge_outputs(bench.session, bench.capabilities, context, plain.settings, rest, result.token_ids)
        if not judgement.passes and not _rounding(bench, judgement):
            bench.same(from_here, result, wrong=f"speculation changed the output ({name}).")
        found += 1
        start += position + 1
        if start >= len(plain.token_ids):
            return found
        again, left = [*plain.prompt_token_ids, *plain.token_ids[:start]], len(plain.token_ids) - start
        result = bench.session.generate(again, **{**greedy_settings(left), **settings})


def _rounding(bench: Bench, judgement: Judgement) -> bool:
    """Whether rounding to 16 bits may be all that differs, where the verdict's stricter rule says no.

    That rule compares a margin with the noise around it; the routing of a mixture of experts may flip at the place
    itself. Here the frequency of such places is tested as well.
    """
    tie, (_, other) = judgement.tie, judgement.tokens or (None, None)
    if bench.is_fine or other is None:
        return False
    if stepping_engine(bench.session) is not None:
        if tie is None or tie.explained is None or tie.steps is None:
            return False
        return other in tie.control and tie.steps <= tie.explained
    if "logprobs" not in bench.capabilities.sampling:
        return True  # nothing is shown: the frequency decides
    return tie is not None and tie.margin is not None and abs(tie.margin) <= _APART
