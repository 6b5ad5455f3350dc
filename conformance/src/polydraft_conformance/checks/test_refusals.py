"""Bad input is a typed error before any work, and unclaimed features are refused."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import polydraft
from polydraft.contract import GenerationSettings
from polydraft.errors import (
    DeviceError,
    InvalidRequestError,
    ModelNotFoundError,
    PolydraftError,
    SpeculationUnavailableError,
    UnsupportedError,
)

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.counting import logged

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft import Session

    from polydraft_conformance.bench import Bench

_BAD_SETTINGS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 0},
    {"max_new_tokens": -1},
    {"max_new_tokens": 2.5},
    {"min_new_tokens": -1},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "hot"},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"min_p": 1.5},
    {"typical_p": 0.0},
    {"seed": -1},
    {"seed": 1.5},
    {"seed": "x"},
    {"stop": [""]},
    {"stop": ""},
    {"stop_token_ids": [-1]},
    {"logprobs": -1},
    {"repetition_penalty": 0.0},
    {"presence_penalty": 3.0},
    {"frequency_penalty": "much"},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: 1000.0}},
    {"banned_token_ids": [-1]},
    {"forced_token_ids": {-1: 1}},
    {"logits_processor": "top"},
    {"guided": {"xml": "<a/>"}},
    {"guided": {"regex": 5}},
    {"guided": {"choice": []}},
    {"acceptance": "always"},
    {"speculate": "maybe"},
)
_BAD_PROMPTS: tuple[Any, ...] = (
    "",
    "half a pair: \ud800",
    [],
    [-1],
    [10**9],
    [1.5],
    None,
    7,
    [{"role": "user"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "half a pair: \ud800"}],
    [{"content": "no role"}],
)
_SAMPLES: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "typical_p": 0.9,
    "seed": 3,
    "min_new_tokens": 2,
    "logprobs": 2,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {1: 2.0},
    "banned_token_ids": [1],
    "forced_token_ids": {0: 1},
    "logits_processor": lambda prefix_ids, logits: logits,
    "guided": {"choice": ["yes", "no"]},
    "acceptance": "rejection",
}
"""A good value of each setting that a backend may claim."""


@check(scope="once", after=("test_generates",))
def test_bad_settings_are_refused(polydraft_bench: Bench) -> None:
    """Settings out of range or of a wrong type raise InvalidRequestError, with a hint, before the engine is asked.

    Proves: A setting out of range is an error before any work, with a hint what to do.
    A failure means: The value was accepted, or raised another error, or only after the prefill. The core checks
    settings, so look there first.
    Look at: What the plugin changes about sessions, if anything; errors that `WholeEngine.check_settings` raises.
    """
    for settings in _BAD_SETTINGS:
        _expect_refused(polydraft_bench.session, InvalidRequestError, f"{settings}", "Hello", **settings)
    _expect_refused(
        polydraft_bench.session, (InvalidRequestError, TypeError), "an unknown setting", "Hello", tempratur=1.0
    )


@check(scope="once", after=("test_generates",))
def test_bad_prompts_are_refused(polydraft_bench: Bench) -> None:
    """Prompts that are empty, of a wrong type, or hold invalid tokens or text raise InvalidRequestError.

    Proves: An empty prompt, invalid ids and invalid text are an error before any work.
    A failure means: The prompt was accepted, or raised another error than `InvalidRequestError`.
    Look at: The tokenizer: `encode` and `chat` must not accept or change what the core passes on, and `vocab_size` must
    be right.
    """
    for prompt in _BAD_PROMPTS:
        _expect_refused(polydraft_bench.session, InvalidRequestError, f"the prompt {prompt!r}", prompt)


@check(scope="once", after=("test_generates",))
def test_images_are_refused(polydraft_bench: Bench) -> None:
    """Image and audio parts raise UnsupportedError: they are not silently dropped.

    Proves: Images and audio are refused instead of being left out of the prompt.
    A failure means: A part of a message was dropped silently, or raised another error.
    Look at: `Tokenizer.chat`: it must not skip parts that it does not know.
    """
    for kind in ("image", "audio"):
        message = {
            "role": "user",
            "content": [{"type": "text", "text": "What is this?"}, {"type": kind, kind: "x.bin"}],
        }
        _expect_refused(polydraft_bench.session, UnsupportedError, f"a message part of type {kind}", [message])


_OF_SAMPLING = {"top_p", "top_k", "min_p", "typical_p", "seed"}


@check(scope="once", after=("test_generates",))
def test_settings_not_claimed_are_refused(polydraft_bench: Bench) -> None:
    """A sampling setting that the capabilities do not claim raises UnsupportedError: it is not silently ignored.

    Proves: A setting that the engine does not honour is refused instead of being ignored.
    A failure means: The setting was accepted although `Capabilities.sampling` does not name it.
    Look at: `Backend.capabilities`; a backend that patches the core's checks.
    """
    capabilities = polydraft_bench.capabilities
    known = set(GenerationSettings.model_fields)
    for name in sorted((set(_SAMPLES) & known) - capabilities.sampling):
        needs = {"temperature": 1.0} if name in _OF_SAMPLING & capabilities.sampling else {}
        _expect_refused(
            polydraft_bench.session,
            UnsupportedError,
            f"{name}, which is not claimed",
            "Hello",
            **{**needs, name: _SAMPLES[name]},
        )


@check(scope="once")
def test_bad_loads_are_refused(polydraft_bench: Bench) -> None:
    """Unknown models, devices and options, and a k that is out of range, are typed errors of load().

    Proves: A load that cannot be honoured is a typed error that says what is wrong and what to do.
    A failure means: The backend loaded something else than was asked for, or failed with an error of its engine.
    Look at: `Backend.load_engine`: dtype, device and context length that the engine does not have; the errors in
    `polydraft.errors`.
    """
    capabilities = polydraft_bench.capabilities
    bad: list[tuple[dict[str, Any], type[PolydraftError]]] = [
        ({"num_speculative_tokens": 0}, InvalidRequestError),
        ({"num_speculative_tokens": -1}, InvalidRequestError),
        ({"num_speculative_tokens": capabilities.max_speculative_tokens + 1000}, PolydraftError),
        ({"drafter": "builtin:no-such-model"}, ModelNotFoundError),
        ({"drafter": "./no/such/folder"}, ModelNotFoundError),
        ({"dtype": "float7"}, PolydraftError),
        ({"device": "no-such-device"}, DeviceError),
        ({"engine_options": {"no_such_option": 1}}, InvalidRequestError),
        ({"context_length": 0}, InvalidRequestError),
        ({"context_length": 10**9}, PolydraftError),
    ]
    if "bitwise" not in capabilities.exactness:
        bad.append(({"exactness": "bitwise"}, UnsupportedError))
    for changes, error in bad:
        load = partial(polydraft_bench.suite.load, polydraft_bench.case, **changes)
        _expect_load_refused(load, changes, error)
    _expect_load_refused(
        lambda: polydraft.load(
            "builtin:no-such-model",
            backend=polydraft_bench.suite.options.backend,
            host=polydraft_bench.suite.host,
        ),
        {"target": "builtin:no-such-model"},
        ModelNotFoundError,
    )


@check(scope="once", after=("test_generates",))
def test_speculation_is_never_dropped_silently(polydraft_bench: Bench) -> None:
    """Without a drafter, speculate="on" refuses, and "auto" decodes plainly and says why.

    Proves: Without a drafter, the session says so: `speculate="on"` is refused, and a plain result names the reason.
    A failure means: Plain decoding was passed off as speculation, or speculation is reported where none can be.
    Look at: `RunningInfo.of`, which takes the method from the plan; `load_engine` where `request.plan.drafter` is None.
    """
    with polydraft_bench.opened(drafter=None, num_speculative_tokens=None) as bench:
        session, running = bench.session, bench.session.running
        expect(running.method is None, f"Loaded without a drafter, session.running.method is {running.method!r}.")
        expect(running.num_speculative_tokens == 0, f"Loaded without a drafter, k is {running.num_speculative_tokens}.")
        result = session.generate("Hello", max_new_tokens=4, speculate="auto")
        expect(result.speculation_off is not None, "Decoded plainly, the result does not say why.")
        _expect_refused(
            session, SpeculationUnavailableError, "speculate='on' without a drafter", "Hello", speculate="on"
        )


def _expect_refused(
    session: Session, error: type[Exception] | tuple[type[Exception], ...], what: str, prompt: Any, **settings: Any
) -> None:
    """``generate`` and ``stream`` must raise ``error``, and the engine must not have been asked for anything."""
    settings = {"max_new_tokens": 4, **settings}
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: session.generate(prompt, **settings),
        "stream": lambda: list(session.stream(prompt, **settings)),
    }
    for name, call in calls.items():
        with logged(session) as logs:
            try:
                call()
            except error as raised:
                _expect_explained(raised, what)
            except Exception as other:
                raise AssertionError(f"{name}() with {what} raised {type(other).__name__} ({other}).") from other
            else:
                raise AssertionError(f"{name}() accepted {what}.")
        expect(not any(log.prompt for log in logs or ()), f"{name}() with {what} was refused only after the prefill.")


def _expect_load_refused(load: Callable[[], Session], what: dict[str, Any], error: type[PolydraftError]) -> None:
    try:
        session = load()
    except error as raised:
        _expect_explained(raised, str(what))
        return
    except Exception as other:
        raise AssertionError(
            f"load() with {what} raised {type(other).__name__} ({other}), not {error.__name__}."
        ) from other
    session.close()
    raise AssertionError(f"load() accepted {what}.")


def _expect_explained(error: BaseException, what: str) -> None:
    """A polydraft error has one sentence that says what is wrong, and one that says what to do."""
    if isinstance(error, PolydraftError):
        expect(bool(error.message), f"The error for {what} has no message.")
        expect(bool(error.hint), f"The error for {what} has no hint: {error.message}")
