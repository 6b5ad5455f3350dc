"""Sampling: a seed means the same with and without speculation, and settings are honoured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import MODEL_KINDS, expect, is_seed_identical, samples
from polydraft_conformance.comparison import expect_same
from polydraft_conformance.counting import logged
from polydraft_conformance.distribution import BEST, DRAWS, QUICK_DRAWS, judge_draws
from polydraft_conformance.evidence import plain_result, speculation_of
from polydraft_conformance.noise import epsilon_of
from polydraft_conformance.prompts import prompt_of_length
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft import Session
    from polydraft.contract import TokenLogprobs

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite


def _uneven(prefix_ids: Sequence[int], logits: Any) -> Any:
    """A pure logits processor that any array library can run: it shows whether a row is given its own prefix."""
    return logits * (0.6 + (prefix_ids[-1] + len(prefix_ids)) % 5 / 10)


_NEW_TOKENS = 32
_FEW_TOKENS = 16
"""Enough that two samples at a high temperature are the same only if they must be."""
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.4, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5, "banned_token_ids": (5, 9, 40)},
    {"temperature": 0.8, "logits_processor": _uneven},
)
_BATCH = 40
"""Generations that are asked for together."""
_CERTAIN = 0.95
"""Where the best token has more, there is nothing to be biased about."""
_AFTER = ("test_generates", "test_greedy_equals_plain")


@check(scope="target", after=_AFTER, claims=samples("temperature"))
def test_temperature_changes_the_output(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session
) -> None:
    """Sampled outputs differ from the greedy one, plainly and with speculation."""
    prompt = _prompt(polydraft_suite, polydraft_case, polydraft_session)
    settings: dict[str, Any] = {"max_new_tokens": _FEW_TOKENS, "ignore_eos": True}
    for speculate in ("off", "auto"):
        greedy = polydraft_session.generate(prompt, speculate=speculate, temperature=0.0, **settings).token_ids
        outputs = [
            polydraft_session.generate(
                prompt, speculate=speculate, temperature=1.4, **_seed(polydraft_suite, seed), **settings
            ).token_ids
            for seed in range(4)
        ]
        expect(
            any(output != greedy for output in outputs),
            f"The temperature is ignored (speculate={speculate!r}): four outputs at temperature 1.4 are all greedy.",
        )


@check(scope="target", after=(*_AFTER, "test_temperature_changes_the_output"), claims=samples("temperature", "seed"))
def test_seed_decides_the_output(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """One seed gives the same output again, other seeds give others, and a drawn seed is told."""
    prompt = _prompt(polydraft_suite, polydraft_case, polydraft_session)
    settings: dict[str, Any] = {"max_new_tokens": _FEW_TOKENS, "ignore_eos": True, "temperature": 1.4}
    for speculate in ("off", "auto"):
        where = f"speculate={speculate!r}"
        outputs = [
            polydraft_session.generate(prompt, speculate=speculate, seed=seed, **settings).token_ids
            for seed in (1, 2, 3, 1)
        ]
        expect(outputs[0] == outputs[3], f"The seed is ignored ({where}): seed 1 gave two different outputs.")
        expect(len(set(outputs)) > 1, f"The seed is ignored ({where}): three seeds gave the same output.")
        drawn = polydraft_session.generate(prompt, speculate=speculate, **settings)
        expect(drawn.settings.seed is not None, f"The result does not tell the seed that was drawn ({where}).")
        again = polydraft_session.generate(prompt, speculate=speculate, seed=drawn.settings.seed, **settings)
        expect(
            again.token_ids == drawn.token_ids, f"The drawn seed that the result tells is not the one used ({where})."
        )


_SEEDED = (*_AFTER, "test_temperature_changes_the_output", "test_seed_decides_the_output")


@check(scope="case", after=(*_SEEDED, "test_drafts_are_made"), claims=is_seed_identical)
def test_sample_equals_plain(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_numbers: dict[str, Any]
) -> None:
    """A seed gives the same tokens with and without speculation, for every k, drafter and setting."""
    suite, case = polydraft_suite, polydraft_case
    assert suite.capabilities is not None
    prompt = _prompt(suite, case, polydraft_session)
    # All settings at the usual k; at the others one suffices.
    settings_of_case = _SETTINGS[:: 2 if suite.options.quick else 1] if case.k == suite.k_values[0] else _SETTINGS[:1]
    runs = []
    for seed, settings in enumerate(settings_of_case):
        if not set(settings) <= suite.capabilities.sampling:
            continue
        sampling = {**settings, "seed": seed, "max_new_tokens": _NEW_TOKENS, "ignore_eos": True}
        plain = plain_result(suite, polydraft_session, case, prompt, sampling)
        with logged(polydraft_session) as logs:
            result = polydraft_session.generate(prompt, **sampling)
        runs.append((result, logs[-1] if logs else None))
        expect_same(
            suite,
            case,
            polydraft_session,
            prompt,
            plain.token_ids,
            result.token_ids,
            wrong=f"Speculation changed the sample of {settings}, seed {seed}.",
            settings=sampling,
        )
    speculation = speculation_of(runs)
    polydraft_numbers["sampled_acceptance_rate"] = speculation.acceptance_rate
    polydraft_numbers["sampled_drafts"] = speculation.drafted
    if case.kind in MODEL_KINDS:  # n-grams of sampled text may not come back
        expect(speculation.drafted != 0, "The check shows nothing: no draft was made while sampling.")


@check(
    scope="kind",
    after=(*_SEEDED, "test_sample_equals_plain", "test_drafts_are_accepted"),
    claims=samples("temperature"),
)
def test_sampled_drafts_are_accepted(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_numbers: dict[str, Any]
) -> None:
    """Some drafts are accepted under sampling, too."""
    prompt = _prompt(polydraft_suite, polydraft_case, polydraft_session)
    runs = []
    for seed in range(4):
        with logged(polydraft_session) as logs:
            settings: dict[str, Any] = {
                "temperature": 0.7,
                "max_new_tokens": _NEW_TOKENS,
                **_seed(polydraft_suite, seed),
            }
            result = polydraft_session.generate(prompt, ignore_eos=True, **settings)
        runs.append((result, logs[-1] if logs else None))
    speculation = speculation_of(runs)
    polydraft_numbers["sampled_acceptance_rate"] = speculation.acceptance_rate
    if speculation.accepted is None:
        not_claimed("The engine does not report accepted drafts.")
    if polydraft_case.kind in MODEL_KINDS:  # n-grams of sampled text may not come back
        expect(
            speculation.accepted > 0,
            f"Acceptance is 0 under sampling: none of {speculation.drafted} draft tokens was accepted.",
        )


@check(scope="target", after=(*_SEEDED, "test_sample_equals_plain"), claims=samples("temperature", "seed"))
def test_streamed_sample_is_the_same(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """Streaming gives the same sample of a seed as generate does."""
    prompt = _prompt(polydraft_suite, polydraft_case, polydraft_session)
    settings: dict[str, Any] = {"temperature": 0.8, "seed": 21, "max_new_tokens": _NEW_TOKENS}
    wanted = polydraft_session.generate(prompt, **settings)
    found = streamed(polydraft_session, prompt, **settings)
    expect(
        found.token_ids == wanted.token_ids,
        f"A streamed sample is another one: {list(found.token_ids)}, not {list(wanted.token_ids)}.",
    )


@check(scope="kind", after=_AFTER, claims=samples("logprobs"))
def test_logprobs_equal_plain(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """Log-probabilities are given for every token, drafts included, and are those of plain decoding."""
    prompt = _prompt(polydraft_suite, polydraft_case, polydraft_session)
    settings: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True, "logprobs": 3}
    plain = polydraft_session.generate(prompt, speculate="off", **settings)
    found = polydraft_session.generate(prompt, **settings)
    for name, result in (("plain", plain), ("speculative", found)):
        logprobs = result.logprobs or ()
        expect(
            tuple(entry.token_id for entry in logprobs) == result.token_ids,
            f"The {name} result has log-probabilities of other tokens than those that came out.",
        )
        expect(all(len(entry.top) == 3 for entry in logprobs), f"The {name} result has not 3 best tokens everywhere.")
        expect(all(entry.logprob <= 1e-6 for entry in logprobs), f"The {name} result has log-probabilities above 0.")
        expect(
            all(entry.top[0][1] <= entry.logprob + 1e-6 for entry in logprobs),
            f"The {name} result is greedy, but a best token's log-probability is above the chosen one's.",
        )
    noise = polydraft_suite.cache.get(("noise", polydraft_case.pair))
    # Where logits cannot be read, an eighth of a nat tells tokens apart.
    bound = 0.125
    if noise is not None:
        # An engine may have no noise on the short context that it was measured on, and some on others.
        bound = 32 * max(noise.most, epsilon_of(polydraft_session.running.dtype) * noise.largest_logit)
    gaps = [
        abs(left.logprob - right.logprob)
        for left, right in zip(plain.logprobs or (), found.logprobs or (), strict=True)
        if left.token_id == right.token_id
    ]
    expect(max(gaps) <= bound, f"Log-probabilities differ by {max(gaps):.3g} with speculation, more than {bound:.3g}.")


@check(
    scope="kind",
    after=(*_SEEDED, "test_drafts_are_made", "test_logprobs_equal_plain"),
    claims=samples("temperature", "logprobs"),
    time_factor=10,
)
def test_samples_follow_the_distribution(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_numbers: dict[str, Any]
) -> None:
    """While speculating, the output tokens 2 to k+2 are drawn from the target's exact probabilities: G-tests."""
    suite, case = polydraft_suite, polydraft_case
    assert suite.capabilities is not None
    first = suite.pairs[0].case(case.k)
    if suite.capabilities.seed_identical and (case != first or suite.options.quick):
        not_claimed(f"Samples equal plain ones seed by seed; the rule is tested by full runs, on {first.id}.")
    draws: list[Sequence[TokenLogprobs]] = []
    wanted = QUICK_DRAWS if suite.options.quick else DRAWS
    window = case.pair.window
    prompts = [
        list(prompt_of_length(suite, polydraft_session, case, length))
        for length in (max(2, window // 4), max(3, window // 2), max(4, window - 4), window + 9)
    ]
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "max_new_tokens": case.k + 2,
        "ignore_eos": True,
        "logprobs": BEST,
        "speculate": "on",
    }
    drafted: list[int | None] = []
    while len(draws) < wanted:
        batch = prompts * (_BATCH // len(prompts))
        results = polydraft_session.generate_many(batch, **settings, **_seed(suite, len(draws)))
        for result in results:
            expect(
                result.logprobs is not None and len(result.logprobs) == case.k + 2,
                f"{len(result.logprobs or ())} log-probabilities came out for {case.k + 2} tokens.",
            )
            draws.append(result.logprobs or ())
            drafted.append(result.stats.num_draft_tokens)
    if case.kind in MODEL_KINDS:
        expect(None in drafted or any(drafted), "The check shows nothing: no draft was made while sampling.")
    proof = judge_draws(draws[:wanted])
    polydraft_numbers["distribution"] = proof.as_dict()
    expect(
        proof.best_token[1] <= _CERTAIN,
        f"The check shows nothing: the target gives its best token {proof.best_token[1]:.1%} on average.",
    )
    expect(not proof.biased, f"Sampling is biased while speculating: {proof.in_words()}")


def _prompt(suite: Suite, case: Case, session: Session) -> list[int]:
    """One whose output crosses the window's edge."""
    return list(prompt_of_length(suite, session, case, max(2, case.pair.window - 4)))


def _seed(suite: Suite, seed: int) -> dict[str, Any]:
    """``seed=`` where the backend claims it."""
    capabilities = suite.capabilities
    return {"seed": seed} if capabilities is not None and "seed" in capabilities.sampling else {}
