"""Settings: every one that is claimed decides every token, on drafted rows as on others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from polydraft.errors import UnsupportedError
from polydraft.verification import difference

from polydraft_conformance.catalog import check, not_claimed, unchecked
from polydraft_conformance.choices import BEST, other_engine, recorded, rows_of, scored_trial, told_trial
from polydraft_conformance.claims import MODEL_KINDS, expect, samples
from polydraft_conformance.counting import logged, stepping_engine
from polydraft_conformance.draft_counts import draft_counts, expect_full_drafts
from polydraft_conformance.settings_proof import Evidence, Trial, judge_by_rule, judge_logprobs
from polydraft_conformance.streams import Streamed, streamed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from polydraft.contract import Capabilities, Speculate, SteppingEngine

    from polydraft_conformance.bench import Bench

_AFTER = (
    *("test_generates", "test_greedy_equals_plain", "test_drafts_are_made", "test_drafts_are_accepted"),
    *("test_temperature_changes_the_output", "test_seed_decides_the_output"),
)
_FEW, _MANY = 28, 96
"""Tokens of one generation whose choices are recalculated: in a quick run, in a full one."""
_PLAIN = 14
"""Of one without speculation."""
_MODES: tuple[Speculate, ...] = ("auto", "off")
_SAMPLED, _LOOKS_QUICK, _LOOKS = 48, 2, 6
"""Tokens of one generation that is judged by evidence, and how many there are at most in a quick and a full run."""


_KNOWN = 28
"""Of one whose outcome is known."""


def _uneven(prefix_ids: Sequence[int], logits: Any) -> Any:
    """A pure logits processor that any array library can run: it shows whether a row is given its own prefix."""
    return logits * (0.6 + (prefix_ids[-1] + len(prefix_ids)) % 5 / 10)


def _lets_choose(capabilities: Capabilities) -> str | None:
    """Requires a setting that changes what is chosen."""
    if capabilities.sampling - {"seed", "logprobs", "acceptance"}:
        return None
    return "The backend claims no setting that changes what is chosen."


@check(scope="method", after=_AFTER, claims=_lets_choose, time_factor=4)
def test_settings_decide_every_choice(polydraft_bench: Bench) -> None:
    """Every token is the one that the settings choose from its row of logits, by a second implementation.

    Proves: for each claimed setting, greedily and sampled, with and without speculation, every row's token is what an
    independent implementation of the settings chooses from that row's logits: biases, penalties, bans, filters,
    temperature, and the noise of seed and position; and the logits of a sampled request are those of a greedy one.
    A failure means: a setting is ignored or applied wrongly, in the rows that the message names.
    Look at: how the engine calls `Sampler.choose` (its `first_position` and `run_token_ids`), and whether it chooses
    by itself.
    """
    bench, session = polydraft_bench, polydraft_bench.session
    engine = stepping_engine(session)
    if engine is None or not bench.capabilities.exposes_logits:
        not_claimed("The engine's logits cannot be read; test_samples_follow_the_settings judges what comes out.")
    judged = 0
    compared: set[Speculate] = set()
    for settings in _mine(bench, _settings(bench)):
        # A sample that depends on the drafts is no choice by the rule; only its probabilities are known.
        evidence: Evidence | None = None
        for speculate in _MODES:
            length = _PLAIN if speculate == "off" else _FEW if bench.quick else _MANY
            call = {**settings, "max_new_tokens": length, "ignore_eos": "min_new_tokens" not in settings}
            prompt = _prompt(bench, judged)
            seed = _seed(bench, settings, judged)
            with recorded(engine) as recordings:
                result = session.generate(prompt, speculate=speculate, **call, **seed)
            rejects = settings.get("acceptance") == "rejection" and speculate == "auto"
            eos = frozenset() if call["ignore_eos"] else session.tokenizer.eos_token_ids
            all_rows = not rejects and "logits_processor" not in settings
            trial = recordings[-1].trial(result, eos, all_rows=all_rows)
            if rejects:
                evidence = evidence or Evidence(bench.random("rejection"))
                evidence.add(trial)
                count, problem = len(evidence.judged), evidence.problem
            else:
                count, problem = judge_by_rule([trial])
            judged += count
            if problem and _is_right_when_fresh(bench, prompt, eos, {**call, "speculate": speculate, **seed}):
                problem = (
                    f"settings or state of an earlier request are still in effect (a fresh session is right): {problem}"
                )
            expect(not problem, f"{_capital(problem)}\nsettings: {_words(settings)}, speculate={speculate!r}")
            if settings["temperature"] and speculate not in compared:
                compared.add(speculate)
                _expect_greedy_logits(bench, engine, trial, result.token_ids)
    bench.numbers["choices_judged"] = judged
    expect(judged > 0, "The check proves nothing: no choice could be judged.")


@check(
    scope="method",
    after=(
        *("test_settings_decide_every_choice", "test_logprobs_are_the_targets", "test_long_output_equals_plain"),
        *("test_sample_equals_plain", "test_seed_decides_the_output", "test_every_request_drafts_k_tokens"),
        "test_target_logits_equal_reference",
    ),
    claims=_lets_choose,
    time_factor=4,
)
def test_settings_hold_in_long_outputs(polydraft_bench: Bench) -> None:
    """Far from the start, too, every token is the one that the settings choose, and k tokens are drafted.

    Proves: after a prompt of hundreds of tokens and up to the last of a hundred output tokens, penalties count all
    tokens, `min_new_tokens` and forced tokens reach as far as was asked, noise and large seeds are what they should be,
    log-probabilities are the target's, as many best tokens are listed as were asked for, drafts go on, and the logits
    of a sampled request are those of a greedy one.
    A failure means: something is right at the start of an output only, or for small seeds only; or a sampled request
    runs the model in another way.
    Look at: buffers of recent tokens (`repeat_last_n`), tables of fixed size, counters that wrap, types that seeds pass
    through, and what depends on the temperature before the sampler is called.
    """
    bench, session = polydraft_bench, polydraft_bench.session
    engine = stepping_engine(session)
    if engine is None or not bench.capabilities.exposes_logits:
        not_claimed("The engine's logits cannot be read.")
    random = bench.random("long outputs")
    room = session.running.context_length - bench.case.k - 2
    for number, settings in enumerate(_far_settings(bench)):
        count = min(_FAR, room // 2)
        prompt = bench.prompt(max(2, min(random.randrange(226, 290), room - count)), variant=11 + number)
        call: dict[str, Any] = {**settings, "max_new_tokens": count, "ignore_eos": "min_new_tokens" not in settings}
        with recorded(engine) as recordings, logged(session) as logs:
            pieces = streamed(session, prompt, **call)
        eos = frozenset() if call["ignore_eos"] else session.tokenizer.eos_token_ids
        trial, words = recordings[-1].trial(pieces.result, eos, all_rows=True), _words(settings)
        _, problem = judge_by_rule([trial])
        expect(not problem, f"{_capital(problem)}\nsettings: {words}, prompt of {len(prompt)} tokens")
        if entries := pieces.result.logprobs:
            problem = judge_logprobs(trial, entries, _EXACT)
            expect(not problem, f"{_capital(problem)}\nsettings: {words}, prompt of {len(prompt)} tokens")
        _expect_greedy_logits(bench, engine, trial, pieces.token_ids)
        counts = draft_counts(pieces, logs[-1] if logs else None, bench.case.k)
        if bench.case.kind in MODEL_KINDS and counts is not None:
            expect_full_drafts(counts, bench.case.k, f"{words}, prompt of {len(prompt)} tokens")


_FAR = 100
"""Tokens of a long output."""


def _far_settings(bench: Bench) -> list[dict[str, Any]]:
    """What may be right at the start only, as far as it is claimed."""
    random, sampling = bench.random("far settings"), bench.capabilities.sampling
    greedy = bench.plain(bench.prompt(16), max_new_tokens=_MANY // 2, temperature=0.0, ignore_eos=True).token_ids
    ends = tuple(token for token, _ in Counter(greedy).most_common(3))
    forced = {index: random.choice(greedy) for index in sorted(random.sample(range(20, _FAR - 10), 4))}
    wanted: list[dict[str, Any]] = [
        {
            "temperature": round(random.uniform(0.6, 0.8), 3),
            "seed": random.randrange(2**60, 2**62) * 2 + 1,
            "min_new_tokens": _FAR - 4,
            "stop_token_ids": ends,
            "logprobs": random.randrange(8, 20),
        },
        {
            "temperature": round(random.uniform(1.2, 1.5), 3),
            "seed": random.randrange(2**33, 2**40),
            "frequency_penalty": round(random.uniform(0.2, 0.4), 3),
            "presence_penalty": 0.5,
            "forced_token_ids": forced,
        },
    ]
    return [
        {name: value for name, value in settings.items() if name in sampling | {"stop_token_ids"}}
        for settings in wanted
        if {"temperature", "seed"} <= sampling
    ]


def _is_right_when_fresh(bench: Bench, prompt: list[int], eos_token_ids: frozenset[int], call: dict[str, Any]) -> bool:
    """Whether a request that went wrong is right as the first one of a new session."""
    if call.get("acceptance") == "rejection" or "logits_processor" in call:
        return False
    with bench.opened() as fresh, recorded(fresh.engine) as recordings:
        result = fresh.session.generate(prompt, **call)
        return not judge_by_rule([recordings[-1].trial(result, eos_token_ids, all_rows=True)])[1]


def _expect_greedy_logits(bench: Bench, engine: SteppingEngine, trial: Trial, output: Sequence[int]) -> None:
    """The logits that a sampled request chose from are those of a greedy run of the same text."""
    rows, limit = rows_of(engine, trial.prompt, output), bench.tolerance
    pairs = [(choice, rows[len(choice.output)]) for choice in trial.choices if choice.is_emitted]
    gaps = [difference(choice.logits, row) for choice, row in pairs]
    off = [pair for pair, gap in zip(pairs, gaps, strict=True) if gap > limit]
    # Single rows may differ where the routing of a mixture of experts is nearly tied.
    if 4 * len(off) <= len(pairs):
        return
    temperature = trial.settings.temperature
    divided = [pair for pair in off if difference(pair[0].logits * np.float32(temperature), pair[1]) <= limit]
    where = f"{len(off)} of {len(pairs)} rows, {sum(bool(choice.row) for choice, _ in off)} of them drafted ones"
    raise AssertionError(
        f"The temperature is applied twice: logits are divided by it before they reach the sampler, in {where}."
        if 2 * len(divided) > len(off)
        else f"A sampled request has other logits than a greedy one, in {where}: they differ by up to {max(gaps):.3g}, "
        f"and the engine's noise explains {limit:.3g}."
    )


@check(scope="method", after=(*_AFTER, "test_samples_follow_the_distribution"), claims=_lets_choose, time_factor=6)
def test_samples_follow_the_settings(polydraft_bench: Bench) -> None:
    """Tokens are among those that the settings leave, and as frequent as they should be.

    Proves: for each claimed setting, greedily and sampled, with and without speculation, no token comes out that the
    settings exclude, and those that come out are not explained better by any of the faults that are looked for. The
    target's logits are another installed backend's, or else the engine's own log-probabilities.
    A failure means: a setting is ignored or applied wrongly, in the rows that the message names.
    Look at: how the backend translates settings for its engine, and what the engine does with them while speculating.
    """
    bench, session = polydraft_bench, polydraft_bench.session
    if stepping_engine(session) is not None and bench.capabilities.exposes_logits:
        not_claimed("The engine's logits can be read: test_settings_decide_every_choice recalculates every choice.")
    judged: Counter[str] = Counter()
    refused: dict[str, str] = {}
    with other_engine(bench) as other:
        if other is None and "logprobs" not in bench.capabilities.sampling:
            unchecked(
                "no other installed backend shows this target's logits, and this one gives no log-probabilities; "
                "test_settings_change_the_output_as_they_must checks the settings whose outcome is known anyway."
            )

        def look(settings: dict[str, Any], speculate: Speculate, number: int) -> Trial:
            call: dict[str, Any] = {**settings, "ignore_eos": "min_new_tokens" not in settings}
            if other is None:
                call["logprobs"] = BEST
            pieces = streamed(
                session,
                _prompt(bench, number),
                speculate=speculate,
                max_new_tokens=_PLAIN if bench.quick and speculate == "off" else _SAMPLED,
                **call,
                **_seed(bench, settings, number),
            )
            k = bench.case.k if speculate == "auto" else 0
            eos = frozenset() if call["ignore_eos"] else session.tokenizer.eos_token_ids
            if other is None:
                return told_trial(pieces, session.tokenizer.vocab_size, eos, k)
            return scored_trial(other, pieces, eos, k, session.running.precision)

        chosen = _mine(bench, _settings(bench))
        if other is None:
            chosen = [told for settings in chosen if (told := _told(bench, settings))]
        gathered: dict[tuple[int, str], Evidence] = {}
        pools = {speculate: Evidence(bench.random("pool")) for speculate in _MODES}
        # Few settings are looked at more often: the same number of tokens.
        looks = (_LOOKS_QUICK if bench.quick else _LOOKS) * max(1, 16 // max(1, len(chosen)))
        # Round and round: what is badly wrong is found before much was generated.
        for number in range(looks):
            for index, settings in enumerate(chosen):
                for speculate in _MODES if number == 0 or not bench.quick else _MODES[:1]:
                    try:
                        trial = look(settings, speculate, 31 * number + index)
                    except UnsupportedError as error:
                        refused[_words(settings)] = str(error)
                        continue
                    key = index, speculate
                    if key not in gathered:
                        gathered[key] = Evidence(bench.random(f"evidence {index} {speculate}"), pools[speculate])
                    evidence = gathered[key]
                    evidence.add(trial)
                    problem = evidence.problem
                    expect(not problem, f"{_capital(problem)}\nsettings: {_words(settings)}, speculate={speculate!r}")
        for (index, _), evidence in gathered.items():
            judged[_words(chosen[index])] += len(evidence.judged)
    bench.numbers["tokens_judged"] = dict(judged)
    if refused:
        bench.numbers["refused"] = refused
    expect(judged.total() > 0, "The check proves nothing: no token could be judged.")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _words(settings: dict[str, Any]) -> str:
    """Settings for a message."""
    return ", ".join(
        f"{name}={getattr(value, '__name__', value)}" for name, value in settings.items() if name != "ignore_eos"
    )


def _prompt(bench: Bench, number: int) -> list[int]:
    """Short ones, so that outputs cross the window and repeat some of their tokens."""
    return bench.prompt(bench.random(f"prompt {number}").randrange(8, 24), variant=number)


def _seed(bench: Bench, settings: dict[str, Any], number: int) -> dict[str, Any]:
    return bench.seed(1000 + number) if settings.get("temperature") else {}


def _mine(bench: Bench, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of this case in a quick run, where the drafter kinds divide the settings between them."""
    kinds = bench.suite.pairs[0].kinds
    if not bench.quick or bench.case.kind not in kinds:
        return settings
    return settings[kinds.index(bench.case.kind) :: len(kinds)]


def _liked(bench: Bench, random: Random, new_tokens: int, most: int) -> list[int]:
    """Four tokens or more that the model likes here: what is done to them shows."""
    counts: Counter[int] = Counter()
    for variant in range(4):  # a greedy output may repeat one or two tokens
        prompt = bench.prompt(16, variant)
        counts.update(bench.plain(prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True).token_ids)
        if len(counts) >= 4:
            break
    else:
        vocab_size = bench.session.tokenizer.vocab_size
        counts.update(random.sample(range(vocab_size), 4))
    return [token for token, _ in counts.most_common(most)]


def _settings(bench: Bench) -> list[dict[str, Any]]:
    """The settings to try: those that the backend claims, each alone and some together, with values of this run."""
    random = bench.random("settings")
    sampling = bench.capabilities.sampling
    vocab_size = bench.session.tokenizer.vocab_size
    liked = _liked(bench, random, _MANY // 2, 8)
    random.shuffle(liked)
    others = [token for token in range(vocab_size) if token not in liked]
    biased = {liked[0]: -100.0, liked[1]: 5.0, random.choice(others): 4.0}
    forced = {index: random.choice(others) for index in random.sample(range(1, _PLAIN), 3)}
    ends = tuple(liked[:3])

    def near(value: float) -> float:
        return round(value * random.uniform(0.9, 1.1), 3)

    found: list[dict[str, Any]] = [
        # Sharp ones first: a setting that is ignored shows at once.
        {"temperature": 2.0, "top_k": random.randrange(2, 5)},
        {"temperature": near(1.7), "top_p": near(0.5)},
        {"temperature": near(1.7), "min_p": near(0.25)},
        {"temperature": near(1.3), "typical_p": near(0.5)},
        {"temperature": near(1.5), "banned_token_ids": tuple(liked[:4])},
        {"temperature": near(1.2), "logit_bias": biased},
        {"temperature": near(0.9), "presence_penalty": 2.0},
        {"temperature": near(0.9), "presence_penalty": -2.0},
        {"temperature": near(0.9), "frequency_penalty": near(1.5)},
        {"temperature": near(0.9), "frequency_penalty": -near(0.6)},
        {"temperature": near(0.9), "repetition_penalty": near(1.8)},
        {"temperature": near(0.9), "repetition_penalty": near(0.6)},
        # So strong that it matters which way it moves improbable tokens.
        {"temperature": near(1.6), "repetition_penalty": near(6)},
        {"temperature": near(1.2), "forced_token_ids": forced},
        {"temperature": near(0.8), "min_new_tokens": _PLAIN - 2, "stop_token_ids": ends},
        {"temperature": near(0.8), "logits_processor": _uneven},
        *({"temperature": value} for value in (0.1, 0.3, 0.7, 1.0, 1.5, 2.0)),
        {"temperature": near(0.9), "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "acceptance": "rejection"},
        {"temperature": near(1.4), "top_p": near(0.8), "acceptance": "rejection"},
        {"temperature": near(0.8), "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": near(1.2), "top_k": 6, "logit_bias": biased, "frequency_penalty": 0.7, "top_p": 0.9},
        # Greedily.
        {"temperature": 0.0, "presence_penalty": near(1.5)},
        {"temperature": 0.0, "presence_penalty": -near(1.5)},
        {"temperature": 0.0, "frequency_penalty": near(0.8)},
        {"temperature": 0.0, "frequency_penalty": -near(0.8)},
        {"temperature": 0.0, "repetition_penalty": near(1.5)},
        {"temperature": 0.0, "repetition_penalty": near(0.7)},
        {"temperature": 0.0, "logit_bias": biased, "banned_token_ids": (liked[2],), "forced_token_ids": forced},
        {"temperature": 0.0, "min_new_tokens": _PLAIN - 2, "stop_token_ids": ends},
    ]
    return [settings for settings in found if settings.keys() - {"stop_token_ids"} - _always(settings) <= sampling]


def _told(bench: Bench, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings, changed so that the best tokens' log-probabilities tell what they leave; None if none can."""
    # It multiplies logits above 0 and divides others: log-probabilities do not tell which are which.
    if {"repetition_penalty", "logits_processor"} & settings.keys():
        return None
    if {"top_p", "typical_p"} & settings.keys() and not {"top_k", "min_p"} & settings.keys():
        return {**settings, "top_k": 8} if "top_k" in bench.capabilities.sampling else None
    return settings


def _always(settings: dict[str, Any]) -> set[str]:
    """``temperature=0`` is what everyone has."""
    return set() if settings["temperature"] else {"temperature"}


@check(scope="method", after=(*_AFTER, "test_samples_follow_the_settings"), claims=_lets_choose)
def test_settings_change_the_output_as_they_must(polydraft_bench: Bench) -> None:
    """Settings whose outcome is known without the logits have that outcome, plainly and with speculation.

    Proves: filters that leave one token give the greedy output at temperature 2; banned tokens and those of bias -100
    never come out, one of bias 100 always does; forced tokens stand at their places; no stop id comes out before
    `min_new_tokens`; large penalties change a text that repeats its tokens.
    A failure means: the setting is ignored, or ignored in drafts.
    Look at: how the backend translates the setting for its engine, and whether the engine applies it to every row.
    """
    bench = polydraft_bench
    if stepping_engine(bench.session) is not None and bench.capabilities.exposes_logits:
        not_claimed("The engine's logits can be read: test_settings_decide_every_choice recalculates every choice.")
    prompt = _prompt(bench, 0)
    length = _KNOWN if bench.quick else 2 * _KNOWN
    base = bench.plain(prompt, max_new_tokens=length, temperature=0.0, ignore_eos=True)
    tried = []
    for speculate in _MODES:
        for known in _known_outcomes(bench, base.token_ids):
            call = {"max_new_tokens": length, "ignore_eos": True, **known.settings}
            if not known.settings.keys() - {"stop_token_ids"} - _always(known.settings) <= bench.capabilities.sampling:
                continue
            try:
                result = bench.session.generate(prompt, speculate=speculate, **call, **_seed(bench, call, 0))
            except UnsupportedError:
                continue
            where = f"settings: {_words(known.settings)}, speculate={speculate!r}"
            if known.is_greedy:
                bench.same(
                    base, result, wrong=f"`{known.name}` is ignored: it leaves one token, the greedy one ({where})."
                )
            else:
                problem = known.problem(result.token_ids)
                how = "while speculating" if speculate == "auto" else "in plain decoding"
                expect(not problem, f"`{known.name}` is ignored {how}: {problem}\n{where}")
            tried.append(known.name)
    bench.numbers["settings_tried"] = sorted(set(tried))
    if not tried:
        unchecked("none of the settings that the backend claims has an outcome that is known without logits.")


@dataclass(frozen=True, slots=True)
class _Known:
    """Settings whose outcome is known."""

    name: str
    settings: dict[str, Any]
    problem: Callable[[Sequence[int]], str] = lambda _: ""
    """What is wrong with an output; empty if nothing is."""
    is_greedy: bool = False
    """The output is the greedy one."""


def _known_outcomes(bench: Bench, greedy: Sequence[int]) -> Iterator[_Known]:
    """Settings with their outcomes, where the greedy output makes them show."""
    random = bench.random("known outcomes")
    liked = [token for token, _ in Counter(greedy).most_common(6)]
    vocab_size = bench.session.tokenizer.vocab_size
    yield _Known("top_k", {"temperature": 2.0, "top_k": 1}, is_greedy=True)
    yield _Known("top_p", {"temperature": 2.0, "top_p": 1e-6}, is_greedy=True)
    yield _Known("min_p", {"temperature": 2.0, "min_p": 1.0}, is_greedy=True)

    def comes_out(output: Sequence[int]) -> str:
        found = [(index, token) for index, token in enumerate(output) if token in liked]
        return f"token {found[0][1]} came out, {len(found)} times in all, first as {found[0][0]}." if found else ""

    for temperature in (0.0, 1.0):
        yield _Known("banned_token_ids", {"temperature": temperature, "banned_token_ids": tuple(liked)}, comes_out)
        biases = dict.fromkeys(liked, -100.0)
        yield _Known("logit_bias", {"temperature": temperature, "logit_bias": biases}, comes_out)
        wanted = random.choice([token for token in range(vocab_size) if token not in liked])

        def others(output: Sequence[int], wanted: int = wanted) -> str:
            count = sum(token != wanted for token in output)
            return f"{count} of {len(output)} tokens are not the one with bias 100 ({wanted})." if count else ""

        yield _Known("logit_bias", {"temperature": temperature, "logit_bias": {wanted: 100.0}}, others)
        forced = {index: random.randrange(vocab_size) for index in random.sample(range(_KNOWN), 8)}

        def misplaced(output: Sequence[int], forced: dict[int, int] = forced) -> str:
            found = [index for index, token in forced.items() if output[index] != token]
            return f"{len(found)} of {len(forced)} forced tokens are missing, one at place {found[0]}." if found else ""

        yield _Known("forced_token_ids", {"temperature": temperature, "forced_token_ids": forced}, misplaced)
        least = random.randrange(12, _KNOWN)

        def early(output: Sequence[int], least: int = least) -> str:
            found = [index for index, token in enumerate(output[:least]) if token in liked]
            if found:
                return f"output token {found[0]} is a stop id, before min_new_tokens={least}."
            return f"{len(output)} tokens came out, fewer than {least}." if len(output) < least else ""

        yield _Known(
            "min_new_tokens",
            {"temperature": temperature, "min_new_tokens": least, "stop_token_ids": tuple(liked)},
            early,
        )

    def same(output: Sequence[int]) -> str:
        return "the output is the greedy one, which repeats its tokens." if tuple(output) == tuple(greedy) else ""

    # What a penalty takes from (or gives) a token grows with its number of occurrences, beyond any margin.
    if Counter(greedy).most_common(1)[0][1] >= 6:
        yield _Known("frequency_penalty", {"temperature": 0.0, "frequency_penalty": 2.0}, same)
    if len(greedy) - len(set(greedy)) >= 12:
        yield _Known("repetition_penalty", {"temperature": 0.0, "repetition_penalty": 1000.0}, same)


@check(scope="method", after=_AFTER, claims=samples("logprobs"))
def test_logprobs_are_the_targets(polydraft_bench: Bench) -> None:
    """Log-probabilities are those of the target's raw logits at their very place, whatever the settings.

    Proves: greedily and sampled, at several temperatures and with filters and penalties, for accepted drafts, the
    bonus token and others, each entry is the log-softmax of the logits there (read from the engine or calculated by
    another one; else, that of a plain greedy run of the same text).
    A failure means: they are taken after temperature, penalties or filters, from another row, or from the drafter.
    Look at: the rows that the engine scores, and the option that decides between raw and processed log-probabilities.
    """
    bench, session = polydraft_bench, polydraft_bench.session
    recordable = stepping_engine(session) if bench.capabilities.exposes_logits else None
    with nullcontext() if recordable else other_engine(bench) as other:
        for number, settings in enumerate(_scored_settings(bench)):
            # Plainly, greedy and one sampled are enough in a quick run.
            for speculate in _MODES if number in {0, 2} or not bench.quick else _MODES[:1]:
                call: dict[str, Any] = {**settings, "max_new_tokens": _PLAIN, "ignore_eos": True, "logprobs": _BEST}
                call.update(_seed(bench, settings, 500 + number))
                prompt = _prompt(bench, 100 + number)
                if recordable is not None:
                    with recorded(recordable) as recordings:
                        pieces = streamed(session, prompt, speculate=speculate, **call)
                    trial = recordings[-1].trial(pieces.result, frozenset(), all_rows=False)
                else:
                    pieces = streamed(session, prompt, speculate=speculate, **call)
                    k = bench.case.k if speculate == "auto" else 0
                    if other is not None:
                        trial = scored_trial(other, pieces, frozenset(), k, session.running.precision)
                    else:
                        trial = _retold(bench, pieces, number)
                entries = pieces.result.logprobs or ()
                expect(
                    len(entries) == len(pieces.token_ids),
                    f"{len(entries)} log-probabilities came out for {len(pieces.token_ids)} tokens.",
                )
                bound = _EXACT
                if recordable is None:
                    bound = max(_TOLD, 4 * trial.slack, _told_noise(bench) if other is None else 0.0)
                problem = judge_logprobs(trial, entries, bound)
                expect(not problem, f"{_capital(problem)}\nsettings: {_words(settings)}, speculate={speculate!r}")


_BEST = 5
"""Best tokens that are asked for."""
_TOLD = 0.05
"""How far from another engine's, or those of another run."""
_TOLD_COARSE = 0.5
"""The most that rounding in low precision may add: far less than another row's, or the drafter's, are off somewhere."""
_TOLD_GROWTH = 4
"""As a multiple of what plain decoding is off: it was measured on a few short texts."""
_EXACT = 2e-3
"""How far log-probabilities may be from those of the recorded logits: summed in float32, perhaps."""


def _told_noise(bench: Bench) -> float:
    """How far rounding moves log-probabilities between two runs of a text, neither of which has a drafter."""
    if bench.is_fine:
        return 0.0
    bench.numbers["logprob_noise"] = bench.logprob_noise
    return min(_TOLD_COARSE, _TOLD_GROWTH * bench.logprob_noise)


def _retold(bench: Bench, pieces: Streamed, number: int) -> Trial:
    """Some choices of a generation with what a plain greedy run says of the same text: its best tokens there."""
    result = pieces.result
    trial = told_trial(pieces, bench.session.tokenizer.vocab_size, frozenset(), bench.case.k)
    choices = []
    for choice in bench.random(f"retold {number}").sample(list(trial.choices), min(6, len(trial.choices))):
        text = [*result.prompt_token_ids, *choice.output]
        plain = bench.session.generate(
            text, speculate="off", max_new_tokens=1, temperature=0.0, ignore_eos=True, logprobs=BEST
        )
        row = np.full(len(choice.logits), -np.inf)
        for token, logprob in (plain.logprobs or ())[0].top:
            row[token] = logprob
        choices.append(replace(choice, logits=row))
    return replace(trial, choices=choices)


def _scored_settings(bench: Bench) -> list[dict[str, Any]]:
    """Settings that change what log-probabilities would be, were they not raw."""
    random = bench.random("scored settings")
    found: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": round(random.uniform(0.4, 0.6), 3)},
        {"temperature": round(random.uniform(1.5, 2.0), 3), "top_k": 5},
        {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.7},
    ]
    claimed = bench.capabilities.sampling
    found = [settings for settings in found if settings.keys() - _always(settings) <= claimed]
    return [settings for settings in found if bench.takes(settings)]
