"""Sampling: a seed means the same with and without speculation, and settings are honoured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import MODEL_KINDS, expect, is_seed_identical, samples
from polydraft_conformance.counting import logged, stepping_engine
from polydraft_conformance.distribution import BEST, DRAWS, QUICK_DRAWS, judge_draws
from polydraft_conformance.evidence import speculation_of
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import TokenLogprobs

    from polydraft_conformance.bench import Bench


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
    {"temperature": 1.0, "typical_p": 0.8},
)
_BATCH = 40
"""Generations that are asked for together."""
_CERTAIN = 0.95
"""Above this probability, a biased sampler could not be detected."""
_AFTER = ("test_generates", "test_greedy_equals_plain")


@check(scope="target", after=_AFTER, claims=samples("temperature"))
def test_temperature_changes_the_output(polydraft_bench: Bench) -> None:
    """Sampled outputs differ from the greedy one, plainly and with speculation.

    Proves: Sampling is not silently greedy, neither plainly nor with speculation.
    A failure means: Four samples at temperature 1.4 were all the greedy output. If only speculation is greedy, drafts
    are accepted that were chosen greedily.
    Look at: How the temperature reaches the engine, on its speculative path too. Or the model is so certain that no
    other token ever comes out.
    """
    session, prompt = polydraft_bench.session, _prompt(polydraft_bench)
    settings: dict[str, Any] = {"max_new_tokens": _FEW_TOKENS, "ignore_eos": True}
    for speculate in ("off", "auto"):
        greedy = session.generate(prompt, speculate=speculate, temperature=0.0, **settings).token_ids
        outputs = [
            session.generate(
                prompt, speculate=speculate, temperature=1.4, **polydraft_bench.seed(seed), **settings
            ).token_ids
            for seed in range(4)
        ]
        expect(
            any(output != greedy for output in outputs),
            f"The temperature is ignored (speculate={speculate!r}): four outputs at temperature 1.4 are all greedy.",
        )


@check(scope="target", after=(*_AFTER, "test_temperature_changes_the_output"), claims=samples("temperature", "seed"))
def test_seed_decides_the_output(polydraft_bench: Bench) -> None:
    """One seed gives the same output again, other seeds give others, and the result names a drawn seed.

    Proves: A result can be repeated from its seed, and other seeds give other samples.
    A failure means: The seed is ignored, or is not the only thing that decides: order of calls, time, or batch do as
    well.
    Look at: `TokenRequest.seed` and `stream` in a whole engine. A stepping engine gets this from `Sampler.choose`.
    """
    session, prompt = polydraft_bench.session, _prompt(polydraft_bench)
    settings: dict[str, Any] = {"max_new_tokens": _FEW_TOKENS, "ignore_eos": True, "temperature": 1.4}
    for speculate in ("off", "auto"):
        where = f"speculate={speculate!r}"
        first = polydraft_bench.seed_of(1)
        outputs = [
            session.generate(prompt, speculate=speculate, seed=seed, **settings).token_ids
            for seed in (first, first + 1, first + 2, first)
        ]
        expect(outputs[0] == outputs[3], f"The seed is ignored ({where}): seed {first} gave two different outputs.")
        expect(len(set(outputs)) > 1, f"The seed is ignored ({where}): three seeds gave the same output.")
        drawn = session.generate(prompt, speculate=speculate, **settings)
        expect(drawn.settings.seed is not None, f"The result does not name the seed that was drawn ({where}).")
        again = session.generate(prompt, speculate=speculate, seed=drawn.settings.seed, **settings)
        expect(again.token_ids == drawn.token_ids, f"The drawn seed in the result is not the one used ({where}).")


_SEEDED = (*_AFTER, "test_temperature_changes_the_output", "test_seed_decides_the_output")


@check(scope="case", after=(*_SEEDED, "test_drafts_are_made"), claims=is_seed_identical)
def test_sample_equals_plain(polydraft_bench: Bench) -> None:
    """A seed gives the same tokens with and without speculation, for every k, drafter and setting.

    Proves: With a seed, speculation changes no sampled token, for every k, drafter and claimed setting.
    A failure means: A setting counts differently for drafts than for plain steps, or noise depends on the round instead
    of the position.
    Look at: `first_position` and `run_token_ids` in the call of `Sampler.choose`. A whole engine that cannot promise
    this must not claim `seed_identical`.
    """
    session, case, prompt = polydraft_bench.session, polydraft_bench.case, _prompt(polydraft_bench)
    # All settings at the usual k; at the others one suffices.
    usual = case.k == polydraft_bench.suite.k_values[0]
    runs = []
    for seed, settings in enumerate(_SETTINGS[:: 2 if polydraft_bench.quick else 1] if usual else _SETTINGS[:1]):
        if not set(settings) <= polydraft_bench.capabilities.sampling:
            continue
        sampling = {
            **settings,
            "seed": polydraft_bench.seed_of(seed),
            "max_new_tokens": _NEW_TOKENS,
            "ignore_eos": True,
        }
        plain = polydraft_bench.plain(prompt, **sampling)
        with logged(session) as logs:
            result = session.generate(prompt, **sampling)
        runs.append((result, logs[-1] if logs else None))
        polydraft_bench.same(
            plain, result, wrong=f"Speculation changed the sample of {settings}, seed {sampling['seed']}."
        )
    stats = speculation_of(runs).stats
    polydraft_bench.numbers["sampled_acceptance_rate"] = stats.acceptance_rate
    polydraft_bench.numbers["sampled_drafts"] = stats.num_draft_tokens
    if case.kind in MODEL_KINDS:  # n-grams of sampled text may not come back
        expect(stats.num_draft_tokens != 0, "The check proves nothing: no draft was made while sampling.")


@check(
    scope="kind",
    after=(*_SEEDED, "test_sample_equals_plain", "test_drafts_are_accepted"),
    claims=samples("temperature"),
)
def test_sampled_drafts_are_accepted(polydraft_bench: Bench) -> None:
    """Some drafts are accepted under sampling, too.

    Proves: Speculation is of use while sampling, too: the drafter uses the target's noise, or the engine samples its
    drafts.
    A failure means: No draft was accepted at temperature 0.7, although greedy drafts are: the drafter drafts greedily,
    or with other noise.
    Look at: `Sampler.choose_draft`: with position `length + 1` for the first draft, and one more for each further one.
    """
    prompt = _prompt(polydraft_bench)
    settings: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": _NEW_TOKENS, "ignore_eos": True}
    runs = []
    for seed in range(4):
        with logged(polydraft_bench.session) as logs:
            result = polydraft_bench.session.generate(prompt, **settings, **polydraft_bench.seed(seed))
        runs.append((result, logs[-1] if logs else None))
    stats = speculation_of(runs).stats
    polydraft_bench.numbers["sampled_acceptance_rate"] = stats.acceptance_rate
    if stats.num_accepted_tokens is None:
        not_claimed("The engine does not report accepted drafts.")
    if polydraft_bench.case.kind in MODEL_KINDS:  # n-grams of sampled text may not come back
        expect(
            stats.num_accepted_tokens > 0,
            f"Acceptance is 0 under sampling: none of {stats.num_draft_tokens} draft tokens was accepted.",
        )


@check(scope="target", after=(*_SEEDED, "test_sample_equals_plain"), claims=samples("temperature", "seed"))
def test_streamed_sample_is_the_same(polydraft_bench: Bench) -> None:
    """Streaming gives the same sample of a seed as generate does.

    Proves: A seed means the same for `stream` and for `generate`.
    A failure means: The seed or its noise stream depends on how the output is read.
    Look at: `TokenRequest.seed` and `TokenRequest.stream` in a whole engine.
    """
    prompt = _prompt(polydraft_bench)
    settings: dict[str, Any] = {"temperature": 0.8, "seed": polydraft_bench.seed_of(21), "max_new_tokens": _NEW_TOKENS}
    wanted = polydraft_bench.session.generate(prompt, **settings)
    found = streamed(polydraft_bench.session, prompt, **settings)
    expect(
        found.token_ids == wanted.token_ids,
        f"A streamed sample is another one: {list(found.token_ids)}, not {list(wanted.token_ids)}.",
    )


@check(scope="kind", after=_AFTER, claims=samples("logprobs"))
def test_logprobs_equal_plain(polydraft_bench: Bench) -> None:
    """Log-probabilities are given for every token, drafts included, and are those of plain decoding.

    Proves: Every token has its log-probability, from the target's raw logits, drafted or not.
    A failure means: Entries are missing, belong to other tokens, or come from the drafter or from changed logits.
    Look at: `Step.logprobs`, the second thing that `Sampler.choose` returns; in a whole engine the `logprobs` given to
    `Generation.emit`, one for each token of the round.
    """
    session, prompt = polydraft_bench.session, _prompt(polydraft_bench)
    settings: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True, "logprobs": 3}
    plain = session.generate(prompt, speculate="off", **settings)
    found = session.generate(prompt, **settings)
    for name, result in (("plain", plain), ("speculative", found)):
        logprobs = result.logprobs or ()
        expect(
            tuple(entry.token_id for entry in logprobs) == result.token_ids,
            f"The {name} result has log-probabilities of other tokens than those that came out.",
        )
        expect(all(len(entry.top) == 3 for entry in logprobs), f"The {name} result lacks 3 best tokens somewhere.")
        expect(all(entry.logprob <= 1e-6 for entry in logprobs), f"The {name} result has log-probabilities above 0.")
        expect(
            all(entry.top[0][1] <= entry.logprob + 1e-6 for entry in logprobs),
            f"The {name} result is greedy, but a best token's log-probability is above the chosen one's.",
        )
    # Where logits cannot be read: an eighth of a nat, which still distinguishes tokens.
    bound = 0.125
    if polydraft_bench.capabilities.exposes_logits and stepping_engine(session):
        bound = 2 * polydraft_bench.tolerance
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
def test_samples_follow_the_distribution(polydraft_bench: Bench) -> None:
    """While speculating, the output tokens 2 to k+2 are drawn from the target's exact probabilities: G-tests.

    Proves: While speculating, tokens come out as often as the target's probabilities say. Bias is found by G-tests with
    a stated false-alarm rate.
    A failure means: Samples are biased: most often towards the most probable token or towards the drafter. The message
    gives both shares.
    Look at: The rule of acceptance: drafts that were chosen greedily must not be accepted by the drafter's probability
    (exact match, or rejection sampling with the true draft distribution).
    """
    case, quick, window = polydraft_bench.case, polydraft_bench.quick, polydraft_bench.window
    first = polydraft_bench.suite.pairs[0].case(case.k)
    if polydraft_bench.capabilities.seed_identical and (case != first or quick):
        not_claimed(f"Samples equal plain ones seed by seed; the rule is tested by full runs, on {first.id}.")
    wanted = QUICK_DRAWS if quick else DRAWS
    lengths = (max(2, window // 4), max(3, window // 2), max(4, window - 4), window + 9)
    prompts = [polydraft_bench.prompt(length) for length in lengths] * (_BATCH // len(lengths))
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "max_new_tokens": case.k + 2,
        "ignore_eos": True,
        "logprobs": BEST,
        "speculate": "on",
    }
    draws: list[Sequence[TokenLogprobs]] = []
    drafted: list[int | None] = []
    while len(draws) < wanted:
        results = polydraft_bench.session.generate_many(prompts, **settings, **polydraft_bench.seed(len(draws)))
        for result in results:
            expect(
                result.logprobs is not None and len(result.logprobs) == case.k + 2,
                f"{len(result.logprobs or ())} log-probabilities came out for {case.k + 2} tokens.",
            )
            draws.append(result.logprobs or ())
            drafted.append(result.stats.num_draft_tokens)
    if case.kind in MODEL_KINDS:
        expect(None in drafted or any(drafted), "The check proves nothing: no draft was made while sampling.")
    proof = judge_draws(draws[:wanted])
    polydraft_bench.numbers["distribution"] = proof.as_dict()
    expect(
        proof.best_token[1] <= _CERTAIN,
        f"The check proves nothing: the target gives its best token {proof.best_token[1]:.1%} on average.",
    )
    expect(not proof.biased, f"Sampling is biased while speculating: {proof.in_words()}")


def _prompt(bench: Bench) -> list[int]:
    """One whose output crosses the window's edge."""
    return bench.prompt(max(2, bench.window - 4))
