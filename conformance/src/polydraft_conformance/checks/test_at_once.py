"""Several requests: at once, each is its single run; one after the other, none leaves its settings behind."""

from __future__ import annotations

import threading
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.errors import SessionBusyError
from polydraft.verification import first_difference

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import MODEL_KINDS, expect
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.repeats import repeated

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from polydraft.contract import GenerationResult

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain", "test_closing_a_stream_cancels", "test_several_threads")
_PATIENCE = 60.0
"""Seconds to wait for another thread."""
_KNOWN = 16
"""Tokens of the request that is made after each other one."""


@check(
    scope="once",
    after=(*_AFTER, "test_interleaved_streams", "test_many_prompts", "test_seed_decides_the_output"),
    time_factor=2,
)
def test_requests_at_once_are_their_single_runs(polydraft_bench: Bench) -> None:
    """Six requests of other lengths, settings and seeds at once give what each gives alone, in their own results.

    Proves: greedy, sampled, stopped, plain and long requests are read in a drawn order as streams (of concurrent
    sessions), from threads, and through ``generate_many``, while others are cancelled in the middle.
    A failure means: rows of a batch are mixed up, results come in another order, or a request reads another one's
    settings, seed or cache.
    Look at: what the engine keeps per sequence and per batch, and how results are matched with requests.
    """
    bench = polydraft_bench

    def attempt(text: int, _only: Collection[str]) -> dict[str, str]:
        requests = _requests(bench, text)
        alone = [bench.session.generate(request.prompt, **request.settings) for request in requests]
        polydraft_bench.numbers["requests"] = len(requests)
        failed: dict[str, str] = {}
        ways = {"generate_many": _together, "threads": _in_threads}  # the one that tells most comes first
        if bench.session.running.concurrency == "concurrent":
            ways["streams"] = _interleaved
        for way, run in ways.items():
            chosen = [index for index, request in enumerate(requests) if way != "generate_many" or request.common]
            outputs = run(bench, [requests[index] for index in chosen])
            for index, output in zip(chosen, outputs, strict=True):
                wrong = _difference(bench, requests, alone, index, output.token_ids)
                if wrong := wrong or _fewer_drafts(bench, requests[index], alone[index], output):
                    failed.setdefault(way, f"{wrong} ({len(chosen)} requests through {way})")
        return failed

    for message in repeated(bench, attempt, 1 if bench.capabilities.seed_identical else 3).values():
        raise AssertionError(message)


@check(scope="once", after=_AFTER)
def test_settings_do_not_leak(polydraft_bench: Bench) -> None:
    """A request gives its known output whatever the settings of the one before were, ended or cancelled.

    Proves: after each claimed setting, set so that it would change the known output, the known request with default
    settings gives the same tokens, ends the same way, and speculates.
    A failure means: the engine keeps a sampler, stop strings, bans, a seed or a limit from the last request.
    Look at: what is made anew for each request, and what is only overwritten where a setting is given.
    """
    bench = polydraft_bench

    def attempt(text: int, _only: Collection[str]) -> dict[str, str]:
        prompt = bench.prompt(max(4, bench.window // 2), 300 + text)
        known = bench.session.generate(prompt, **greedy_settings(_KNOWN))
        failed: dict[str, str] = {}
        settings = _telling_settings(bench, known, text)
        polydraft_bench.numbers["settings"] = sorted({name for name, _ in settings})
        for number, (name, given) in enumerate(settings):
            # A quick run ends one and cancels the next.
            for cancelled in [bool((number + bench.seed_of(0)) % 2)] if bench.quick else (False, True):
                other = bench.prompt(max(4, bench.window // 2) + 2, 320 + text)
                with closing(bench.session.stream(other, **given)) as stream:
                    next(stream)
                    if not cancelled:
                        for _ in stream:
                            pass
                again = bench.session.generate(prompt, **greedy_settings(_KNOWN))
                end = "cancelled" if cancelled else "ended"
                wrong = f"Settings leak into the next request: `{name}` of a request that was {end} is still in effect"
                how = _changed(bench, known, again)
                if how:
                    failed.setdefault(name, f"{wrong}: {how}")
        return failed

    for message in repeated(bench, attempt).values():
        raise AssertionError(message)


@dataclass(frozen=True, slots=True)
class _Request:
    """A prompt with settings."""

    name: str
    prompt: list[int]
    settings: dict[str, Any]
    common: bool = False
    """Whether it has the settings that all requests of ``generate_many`` have."""


def _requests(bench: Bench, text: int) -> list[_Request]:
    """Of different lengths, not in the order of their lengths."""
    random, window = bench.random(f"at once {text}"), bench.window
    count = 2 * bench.case.k + 4
    greedy = greedy_settings(count)
    lengths = random.sample(range(3, window + 20), 8)

    def prompt(index: int, length: int | None = None) -> list[int]:
        return bench.prompt(length or lengths[index], 200 + 10 * text + index)

    requests = [
        _Request("greedy, a short prompt", prompt(0), greedy, common=True),
        _Request("greedy, a long prompt", prompt(1, 2 * window + random.randint(3, 9)), greedy, common=True),
        _Request("greedy", prompt(2), greedy, common=True),
        _Request("greedy, of one token", prompt(3, 1), greedy, common=True),
        _Request("plain", prompt(4), {**greedy_settings(count - 5), "speculate": "off"}),
    ]
    first = bench.plain(prompt(5), **greedy)
    stop = first.token_ids[random.randint(2, count - 2)]
    requests.append(_Request("ended by a stop id", prompt(5), {**greedy, "stop_token_ids": [stop]}))
    if {"temperature", "seed"} <= bench.capabilities.sampling:
        for index, temperature in ((6, 1.0), (7, 0.7)):
            sampled = {"temperature": temperature, **bench.seed(40 + index + text), "max_new_tokens": count}
            requests.append(_Request(f"sampled at {temperature:g}", prompt(index), {**sampled, "ignore_eos": True}))
    random.shuffle(requests)
    return requests


def _difference(
    bench: Bench, requests: list[_Request], alone: list[GenerationResult], index: int, output: tuple[int, ...]
) -> str:
    """How the output of one among several is not that of its single run; empty if it is."""
    wanted = alone[index]
    if output == wanted.token_ids:
        return ""
    name = requests[index].name
    for other, result in enumerate(alone):
        if other != index and len(output) > 3 and output == result.token_ids:
            return (
                f"Outputs are given to the wrong requests: the request {index} ({name}) got the output of request "
                f"{other} ({requests[other].name})."
            )
    wrong = f"A request among several ({name}) gives another output than alone: rows or settings are mixed up."
    try:
        bench.same(wanted, output, wrong=wrong, names=("alone", "among several"))
    except AssertionError as error:
        place = first_difference(wanted.token_ids, output)
        return str(error) if place is not None else wrong
    return ""


def _fewer_drafts(bench: Bench, request: _Request, alone: GenerationResult, found: GenerationResult) -> str:
    """How drafting gives way to other requests; empty if it does not."""
    wanted, drafted = alone.stats.num_draft_tokens, found.stats.num_draft_tokens
    if bench.case.kind not in MODEL_KINDS or wanted is None or drafted is None or 2 * drafted >= wanted:
        return ""
    return (
        f"Drafting stops while other requests are open: the request {request.name!r} has {drafted} tokens drafted, "
        f"{wanted} alone."
    )


def _interleaved(bench: Bench, requests: Sequence[_Request]) -> list[GenerationResult]:
    """All streams open at once, read in a drawn order; two more are cancelled in the middle."""
    random, session = bench.random("interleaved"), bench.session
    streams = [session.stream(request.prompt, **request.settings) for request in requests]
    extra = [session.stream(requests[0].prompt[:2] + requests[1].prompt[:5], **greedy_settings(90)) for _ in range(2)]
    open_streams = [*range(len(streams))]
    steps = 0
    while open_streams:
        index = random.choice(open_streams)
        chunk = next(streams[index], None)
        if chunk is None:
            open_streams.remove(index)
        steps += 1
        if steps in (1, 3, 5):
            for stream in extra:
                next(stream, None)
        if steps == 7:
            extra[0].close()
            extra[1].cancel()
    for stream in extra:
        stream.close()
    return [stream.result for stream in streams if stream.result is not None]


def _in_threads(bench: Bench, requests: Sequence[_Request]) -> list[GenerationResult]:
    """One thread a request, and one that cancels its own in the middle."""
    found: dict[int, GenerationResult] = {}
    errors: list[str] = []

    def work(index: int) -> None:
        request = requests[index]
        try:
            found[index] = bench.session.generate(request.prompt, **request.settings)
        except Exception as error:  # a thread's error would else only be printed
            errors.append(f"{request.name}: {type(error).__name__}: {error}")

    def cancelled() -> None:
        with suppress(SessionBusyError), closing(bench.session.stream(requests[0].prompt, **greedy_settings(90))) as it:
            next(it)
            next(it)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(requests))]
    threads.insert(len(threads) // 2, threading.Thread(target=cancelled, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PATIENCE)
    if any(thread.is_alive() for thread in threads):
        bench.suite.abandon()
        raise AssertionError(f"{len(threads)} requests from threads block one another for ever.")
    expect(not errors, f"A request among several threads fails: {errors}.")
    return [found[index] for index in range(len(requests))]


def _together(bench: Bench, requests: Sequence[_Request]) -> list[GenerationResult]:
    """Through ``generate_many``."""
    prompts = [request.prompt for request in requests]
    return bench.session.generate_many(prompts, **requests[0].settings)


def _telling_settings(bench: Bench, known: GenerationResult, text: int) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of claimed settings that would change the known output if they were still in effect."""
    tokens = list(dict.fromkeys(known.token_ids))
    other = next(token for token in bench.prompt(90, text)[1:] if token not in tokens)
    # Two values where it depends on the text which of them changes it.
    values: dict[str, list[Any]] = {
        "max_new_tokens": [3],
        "stop_token_ids": [tokens],
        "speculate": ["off"],
        "temperature": [2.0],
        "repetition_penalty": [1.8, 0.4],
        "presence_penalty": [2.0, -2.0],
        "frequency_penalty": [2.0, -2.0],
        "logit_bias": [{other: 100.0}],
        "banned_token_ids": [tokens],
        "forced_token_ids": [dict.fromkeys(range(1, 5), other)],
        "logprobs": [2],
    }
    letters = [letter for letter in known.text if letter.strip() and letter != "\N{REPLACEMENT CHARACTER}"]
    if letters:
        values["stop"] = [sorted(set(letters[:6]))]
    claimed = bench.capabilities.sampling | {"max_new_tokens", "stop_token_ids", "speculate", "stop"}
    found = [
        (name, {**greedy_settings(7), name: value, **(bench.seed(70 + text) if name == "temperature" else {})})
        for name, candidates in values.items()
        if name in claimed
        for value in candidates
    ]
    return [(name, settings) for name, settings in found if bench.takes(settings)]


def _changed(bench: Bench, known: GenerationResult, again: GenerationResult) -> str:
    """How a request that is made again is not what it was; empty if it is."""
    if (again.finish_reason, again.stop_match) != (known.finish_reason, known.stop_match):
        return f"the next one ended with {again.finish_reason!r} after {len(again.token_ids)} tokens."
    if again.logprobs is not None:
        return "the next one has log-probabilities, which it did not ask for."
    if again.text != known.text and again.token_ids == known.token_ids:
        return f"the next one has the same tokens, but the text {again.text!r}, not {known.text!r}."
    drafted = known.stats.num_draft_tokens, again.stats.num_draft_tokens
    if bench.case.kind in MODEL_KINDS and drafted[0] and drafted[1] == 0:
        return "the next one does not speculate."
    try:
        bench.same(known, again, wrong="the next one has another output.", names=("before", "after"))
    except AssertionError as error:
        return str(error)
    return ""
