"""Sampling: a seed means the same with and without speculation, and settings are honoured."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft import SpeculationWarning
from polydraft.contract import GenerationSettings, WholeEngine

from polydraft_conformance.bench import Bench
from polydraft_conformance.catalog import check, not_claimed, unchecked
from polydraft_conformance.choices import BEST, other_engine, scored_trial, told_trial
from polydraft_conformance.claims import MODEL_KINDS, expect, is_seed_identical, samples
from polydraft_conformance.counting import logged, stepping_engine
from polydraft_conformance.evidence import speculation_of
from polydraft_conformance.known_drafters import useless_drafter
from polydraft_conformance.settings_proof import Evidence
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Speculate, SteppingEngine


def _uneven(prefix_ids: Sequence[int], logits: Any) -> Any:
    """A pure logits processor that any array library can run: it shows whether a row is given its own prefix."""
    return logits * (0.6 + (prefix_ids[-1] + len(prefix_ids)) % 5 / 10)


_NEW_TOKENS = 32
_TWICE = ("first", "second")
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
_MODES: tuple[Speculate, ...] = ("auto", "off")
_LONG = 100
"""Tokens of one output whose tokens are compared with their probabilities."""
_QUICK_TOKENS, _TOKENS = 900, 4000
"""How many are compared in all: the first catch a bias such as Transformers 5.22's, the others one of a tenth."""
_MORE = 8
"""So many times as many where those seen are suspicious."""
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
        results = [
            session.generate(prompt, speculate=speculate, seed=seed, **settings)
            for seed in (first, first + 1, first + 2, first)
        ]
        ignored = f"The seed is ignored ({where}): seed {first} gave two different outputs."
        polydraft_bench.same(results[0], results[3], wrong=ignored, names=_TWICE)
        outputs = {result.token_ids for result in results[:3]}
        expect(len(outputs) > 1, f"The seed is ignored ({where}): three seeds gave the same output.")
        drawn = session.generate(prompt, speculate=speculate, **settings)
        expect(drawn.settings.seed is not None, f"The result does not name the seed that was drawn ({where}).")
        again = session.generate(prompt, speculate=speculate, seed=drawn.settings.seed, **settings)
        wrong = f"The drawn seed in the result is not the one used ({where})."
        polydraft_bench.same(drawn, again, wrong=wrong, names=_TWICE)
        if polydraft_bench.quick and speculate == "off":
            continue
        zero = [session.generate(prompt, speculate=speculate, seed=0, **settings) for _ in range(2)]
        wrong = f"Seed 0 is taken as no seed ({where}): it gave two different outputs."
        polydraft_bench.same(zero[0], zero[1], wrong=wrong, names=_TWICE)
        large = 2**62 + 2 * (first % 2**32)
        near = [
            session.generate(prompt, speculate=speculate, seed=large + index, **settings).token_ids
            for index in (0, 1, 2, 0)
        ]
        expect(near[0] == near[3], f"Seed {large} is not repeated ({where}): it gave two different outputs.")
        expect(
            len(set(near)) > 1,
            f"Large seeds are rounded, or a seed decides the first token only ({where}): {large} and the next two gave "
            "one output.",
        )


_SEEDED = (*_AFTER, "test_temperature_changes_the_output", "test_seed_decides_the_output")


@check(
    scope="case",
    after=(*_SEEDED, "test_drafts_are_made", "test_settings_decide_every_choice"),
    claims=is_seed_identical,
)
def test_sample_equals_plain(polydraft_bench: Bench) -> None:
    """A seed gives the same tokens with and without speculation, for every k, drafter and setting.

    Proves: With a seed, speculation changes no sampled token, for every k, drafter and claimed setting.
    A failure means: A setting counts differently for drafts than for plain steps, or noise depends on the round instead
    of the position.
    Look at: `first_position` and `run_token_ids` in the call of `Sampler.choose`. A whole engine that cannot promise
    this must not claim `seed_identical`.
    """
    session, case, prompt = polydraft_bench.session, polydraft_bench.case, _prompt(polydraft_bench)
    suite, quick = polydraft_bench.suite, polydraft_bench.quick
    # All settings at the usual k, in a quick run on the first pair; elsewhere one suffices.
    every = case.k == suite.k_values[0] and (case.pair == suite.pairs[0] or not quick)
    runs = []
    for seed, settings in enumerate(_SETTINGS[:: 2 if quick else 1] if every else _SETTINGS[:1]):
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
    polydraft_bench.same(
        wanted, found.token_ids, wrong="A streamed sample is another one.", names=("whole", "streamed")
    )


@check(scope="kind", after=(*_AFTER, "test_logprobs_are_the_targets"), claims=samples("logprobs"))
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
    scope="method",
    after=(*_SEEDED, "test_drafts_are_made", "test_logprobs_equal_plain"),
    claims=samples("temperature"),
    time_factor=10,
)
def test_samples_follow_the_distribution(polydraft_bench: Bench) -> None:
    """While speculating, every output token is drawn from the target's exact probabilities.

    Proves: at temperature 1, tokens are as frequent as their log-probabilities (the engine's own, or another installed
    backend's) say: in drafted rows, in the first rows of rounds and in bonus rows, each alone and next to its
    neighbour; with the pair's drafter and, of toy models, with one that is never right, whose drafts show best what is
    wrong with accepting them. `settings_proof.py` explains the method.
    A failure means: sampling is biased while speculating, in the rows that the message names; drafts that are accepted
    too often make the most probable tokens too frequent.
    Look at: how a draft is accepted (by p/q, with q what it was really drawn from), and what follows a rejection.
    """
    bench, case = polydraft_bench, polydraft_bench.case
    first = bench.suite.pairs[0].case(case.k)
    if bench.capabilities.seed_identical and (case != first or bench.quick):
        not_claimed(f"Samples equal plain ones seed by seed; the rule is tested by full runs, on {first.id}.")
    suite, tells = bench.suite, _tells_of_drafts(bench)
    with nullcontext() if tells else other_engine(bench) as other, tempfile.TemporaryDirectory() as folder:
        if not tells and other is None:
            unchecked("no other backend shows this target's logits, and this one gives no log-probabilities of drafts.")
        evidence = _distribution(bench, other, "")
        bench.numbers["distribution"] = evidence.as_dict()
        best = evidence.best_token
        expect(best <= _CERTAIN, f"The check proves nothing: the target gives its best token {best:.1%} on average.")
        if case.kind not in MODEL_KINDS:
            return
        useless = useless_drafter(suite, case, Path(folder) / "useless")
        if useless is None or useless.share is None:  # drafts of one token are hardly ever accepted
            return
        wrong = Bench(suite, useless.case, suite.session(useless.case), bench.numbers)
        try:
            where = f" (with a drafter {useless.what})"
            bench.numbers["distribution_with_wrong_drafts"] = _distribution(wrong, other, where).as_dict()
        finally:
            suite.close()  # before its folder goes


def _tells_of_drafts(bench: Bench) -> bool:
    """Whether the engine gives log-probabilities while it speculates; it may declare that it does not."""
    if "logprobs" not in bench.capabilities.sampling:
        return False
    engine = bench.session.engine
    return not isinstance(engine, WholeEngine) or not engine.speculation_conflict(GenerationSettings(logprobs=BEST))


def _distribution(bench: Bench, other: SteppingEngine | None, where: str) -> Evidence:
    """The evidence of samples at temperature 1, which has not failed.

    Args:
        bench: Of a session.
        other: Gives the logits; None: the engine's own log-probabilities do.
        where: Which drafter, for messages.
    """
    session = bench.session
    wanted = _QUICK_TOKENS if bench.quick else _TOKENS
    evidence = Evidence(bench.random(f"distribution{where}"))
    drafted: list[int | None] = []
    number = 0
    while len(evidence.judged) < wanted * (_MORE if evidence.is_suspicious else 1):
        prompt = bench.prompt(bench.random(f"length {number}").randrange(2, bench.window + 9), variant=number)
        call: dict[str, Any] = {} if other is not None else {"logprobs": BEST}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpeculationWarning)  # a drafter that is never right is of no use
            pieces = streamed(
                session,
                prompt,
                temperature=1.0,
                max_new_tokens=min(_LONG, session.running.context_length - len(prompt)),
                ignore_eos=True,
                speculate="on",
                **call,
                **bench.seed(3000 + number),
            )
        drafted.append(pieces.result.stats.num_draft_tokens)
        if other is not None:
            evidence.add(scored_trial(other, pieces, frozenset(), bench.case.k, session.running.precision))
        else:
            entries = pieces.result.logprobs or ()
            expect(
                len(entries) == len(pieces.token_ids),
                f"{len(entries)} log-probabilities came out for {len(pieces.token_ids)} tokens.",
            )
            evidence.add(told_trial(pieces, session.tokenizer.vocab_size, frozenset(), bench.case.k))
        cause = (
            f"Drafts are accepted too often, or what follows a rejection is biased{where}"
            if where
            else "Sampling is biased while speculating"
        )
        expect(not evidence.problem, f"{cause}: {evidence.problem}")
        number += 1
    if bench.case.kind in MODEL_KINDS:
        expect(None in drafted or any(drafted), "The check proves nothing: no draft was made while sampling.")
    return evidence


@check(scope="once", after=(*_SEEDED, "test_sample_equals_plain"), claims=samples("temperature"))
def test_prompts_of_a_batch_have_their_own_noise(polydraft_bench: Bench) -> None:
    """Equal prompts given to generate_many together are sampled independently of each other.

    Proves: equal prompts of one batch, which share a seed, get other samples; where a seed means the same in every
    call, the first one is that of `generate`.
    A failure means: the noise stream of a request is not used: all prompts of a batch are drawn with the same noise.
    Look at: `TokenRequest.stream`, which must be part of an engine's own seed.
    """
    bench, prompt = polydraft_bench, _prompt(polydraft_bench)
    settings: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": _NEW_TOKENS, "ignore_eos": True}
    for speculate in _MODES:
        batch = bench.session.generate_many([prompt] * 4, speculate=speculate, **settings, **bench.seed(60))
        outputs = [result.token_ids for result in batch]
        single = bench.session.generate(prompt, speculate=speculate, **settings, **bench.seed(61))
        shared = max(_shared(outputs[0], other) for other in outputs[1:])
        usual = _shared(outputs[0], single.token_ids)
        expect(
            # A model so certain that two calls hardly differ may repeat itself by chance.
            len(set(outputs)) == len(outputs) or usual > _FEW_TOKENS,
            f"Seed stream reused between prompts: {len(outputs)} equal prompts of one batch gave "
            f"{len(set(outputs))} different outputs of {len(outputs[0])} tokens at temperature 2 "
            f"(speculate={speculate!r}); two of them begin with {shared} equal tokens, two calls with {usual}.",
        )


@check(scope="once", after=(*_SEEDED, "test_sample_equals_plain"), claims=samples("temperature", "seed"))
def test_seed_decides_every_token(polydraft_bench: Bench) -> None:
    """Outputs of different seeds differ further on, too, where their first tokens are the same.

    Proves: among outputs of different seeds whose first tokens are equal, none are equal as a whole.
    A failure means: the seed decides the first token only; the others are drawn with the same noise in every call.
    Look at: where the engine seeds its generator, and whether later steps use it.
    """
    bench, prompt = polydraft_bench, _prompt(polydraft_bench)
    if stepping_engine(bench.session) is not None and bench.capabilities.exposes_logits:
        not_claimed("The engine's logits can be read: test_settings_decide_every_choice recalculates every choice.")
    settings: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": _LONG // 2, "ignore_eos": True}
    for speculate in _MODES:
        outputs: dict[int, list[tuple[int, ...]]] = {}
        for number in range(12):
            output = bench.session.generate(
                prompt, speculate=speculate, seed=bench.seed_of(80 + number), **settings
            ).token_ids
            same = outputs.setdefault(output[0], [])
            same.append(output)
            if len(same) == 3:
                break
        groups = [same for same in outputs.values() if len(same) > 1]
        equal = sum(len(same) - len(set(same)) for same in groups)
        expect(
            not equal,
            f"The seed decides the first token only: {equal} of {sum(map(len, groups))} outputs of different seeds "
            f"are equal in all of their {_LONG // 2} tokens to another with the same first token "
            f"(speculate={speculate!r}, temperature 2).",
        )


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that are the same."""
    return next((index for index, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]), len(left))


def _prompt(bench: Bench) -> list[int]:
    """One whose output crosses the window's edge."""
    return bench.prompt(max(2, bench.window - 4))
