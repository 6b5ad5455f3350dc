"""The keyword arguments of ``load``, written once, and the checks that they pass before anything is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeGuard, cast, get_args

from polydraft._argument_names import did_you_mean_argument
from polydraft._numbers import as_bool, as_int, shown
from polydraft._signatures import shows_arguments
from polydraft.errors import ContextLengthError, InvalidRequestError
from polydraft.secrets import Secret, names_a_secret

if TYPE_CHECKING:
    from polydraft._plugins import PluginHost
    from polydraft.contract.backend import EngineOptions
    from polydraft.contract.records import Exactness

__all__ = [
    "DEFAULTS",
    "MAX_SPECULATIVE_TOKENS",
    "LoadArguments",
    "checked_arguments",
    "load_arguments",
    "refuse_in_measurements",
]

MAX_SPECULATIVE_TOKENS = 128
"""A larger k is an error before anything is looked for; each backend sets a smaller limit."""

_MOST_TOKENS = 2**31 - 1
"""The longest context in tokens: engines hold positions in 32 bits."""

Verify = Literal["require", "warn", "off"]
Install = Literal["ask", "yes", "no"]
Isolation = Literal["auto", "process", "none"]


class LoadArguments(TypedDict, total=False):
    """What ``polydraft.load`` documents. What is left out takes its default."""

    drafter: str | Path | None
    backend: str
    num_speculative_tokens: int | Literal["auto"] | None
    quantization: str
    exactness: Exactness
    context_length: int | None
    prefix_cache_bytes: int | None
    dtype: str
    device: str
    revision: str | None
    cache_dir: str | Path | None
    token: str | Secret | bool | None
    local_files_only: bool
    trust_remote_code: bool
    engine_options: Mapping[str, Any] | EngineOptions | None
    isolation: Isolation
    verified: Verify
    install: Install
    host: PluginHost | None


DEFAULTS: dict[str, Any] = {
    "drafter": "auto",
    "backend": "auto",
    "quantization": "auto",
    "exactness": "standard",
    "dtype": "auto",
    "device": "auto",
    "local_files_only": False,
    "trust_remote_code": False,
    "isolation": "auto",
    "verified": "off",
    "install": "ask",
}
"""The default of each argument whose default is not None."""

load_arguments = shows_arguments(LoadArguments, DEFAULTS)
"""Decorates a function that takes ``**arguments: Unpack[LoadArguments]``."""


def checked_arguments(target: object, given: LoadArguments) -> LoadArguments:
    """All arguments, with defaults where none is given, checked for type and range.

    Raises:
        InvalidRequestError: An argument is unknown, of the wrong type or out of range; the error names it.
    """
    unknown = sorted(set(given) - set(LoadArguments.__annotations__))
    if unknown:
        raise InvalidRequestError(
            f"load has no argument {unknown[0]!r}.", _what_instead(unknown[0]), argument=unknown[0]
        )
    values: dict[str, Any] = {name: DEFAULTS.get(name) for name in LoadArguments.__annotations__} | dict(given)
    if not isinstance(target, str | Path):
        raise _not_understood("target", target, "a Hub id, a folder or builtin:<name>")
    drafter = values["drafter"]
    if drafter is not None and not isinstance(drafter, str | Path):
        raise _not_understood("drafter", drafter, "'auto', 'ngram', None, a Hub id or a folder")
    if isinstance(drafter, str) and not drafter.strip():
        raise InvalidRequestError(
            "The drafter's name is empty.", "Give `drafter=None` for plain decoding, or 'auto'.", argument="drafter"
        )
    for name in ("num_speculative_tokens", "context_length", "prefix_cache_bytes"):
        if (number := as_int(values[name])) is not None:  # numpy's ints, too
            values[name] = number
    _check_k(values["num_speculative_tokens"])
    if drafter is None and values["num_speculative_tokens"] is not None:
        raise InvalidRequestError(
            f"`num_speculative_tokens={values['num_speculative_tokens']!r}` has no effect with `drafter=None`, "
            "which is plain decoding.",
            "Leave one of them out.",
            argument="num_speculative_tokens",
        )
    for name, wanted in _TEXTS.items():
        text = values[name]
        if not (isinstance(text, str) and text.strip()) and not (name == "revision" and text is None):
            raise _not_understood(name, text, wanted)
    for name, allowed in _CHOICES.items():
        if values[name] not in allowed:
            raise InvalidRequestError(
                f"`{name}={shown(values[name])}` is unknown.",
                f"Give {', '.join(repr(one) for one in allowed[:-1])} or {allowed[-1]!r}.",
                argument=name,
            )
    length = values["context_length"]
    if length is not None and (not _is_int(length) or length < 1):
        raise InvalidRequestError(
            f"`context_length={shown(length)}` is not a positive number of tokens.",
            "Leave it out for the model's own.",
            argument="context_length",
        )
    if length is not None and length > _MOST_TOKENS:
        raise ContextLengthError(
            f"`context_length={shown(length)}` is longer than any model's context.",
            "Leave it out for the model's own.",
            argument="context_length",
        )
    cached = values["prefix_cache_bytes"]
    if cached is not None and (not _is_int(cached) or cached < 0):
        raise _not_understood("prefix_cache_bytes", cached, "a number of bytes, or 0 to reuse nothing")
    if values["cache_dir"] is not None and not isinstance(values["cache_dir"], str | Path):
        raise _not_understood("cache_dir", values["cache_dir"], "a folder")
    _wrap_secrets(values)
    if values["token"] is not None and not isinstance(values["token"], Secret | bool):
        # The value is not shown: it may be a secret in a wrapper.
        raise InvalidRequestError(
            "`token` is of the wrong type.", "Give a string, True for the stored one, or False.", argument="token"
        )
    for name in ("local_files_only", "trust_remote_code"):
        if (flag := as_bool(values[name])) is not None:
            values[name] = flag
        else:
            raise _not_understood(name, values[name], "True or False")
    _check_objects(values)
    return cast("LoadArguments", values)


def refuse_in_measurements(given: Mapping[str, Any]) -> None:
    """Refuse arguments of ``load`` that have no effect where sessions are measured or verified.

    Raises:
        InvalidRequestError: One was given.
    """
    if given.get("prefix_cache_bytes"):
        raise InvalidRequestError(
            f"`prefix_cache_bytes={given['prefix_cache_bytes']}` has no effect: here each call runs its whole prompt.",
            "Leave it out.",
            argument="prefix_cache_bytes",
        )
    if given.get("verified", "off") != "off":
        raise InvalidRequestError(
            f"`verified={given['verified']!r}` has no effect: nothing is refused here for want of a verification.",
            "Leave it out.",
            argument="verified",
        )


def _what_instead(unknown: str) -> str:
    from polydraft.contract.requests import GenerationSettings

    if unknown in GenerationSettings.model_fields:
        return f"Give it to the session: `session.generate(prompt, {unknown}=...)`."
    known = LoadArguments.__annotations__
    return f"{did_you_mean_argument(unknown, ['target', *known])} It has: {', '.join(known)}.".strip()


_TEXTS = {
    "backend": "'auto' or the name of a backend (`polydraft backends` lists them)",
    "quantization": "'auto', 'none', or a name such as 'q4_0' or '8bit' (`polydraft pairs MODEL` lists a model's)",
    "dtype": "'auto', 'float32', 'bfloat16' or 'float16'",
    "device": "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'",
    "revision": "a branch, tag or commit",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "exactness": ("standard", "bitwise"),
    "isolation": get_args(Isolation),
    "verified": get_args(Verify),
    "install": get_args(Install),
}


def _wrap_secrets(values: dict[str, Any]) -> None:
    """From here on the token, and engine options that are secrets by their names, cannot be shown by accident."""
    if isinstance(values["token"], str):
        values["token"] = Secret(values["token"], "`token`")
    options = values["engine_options"]
    if isinstance(options, Mapping):
        values["engine_options"] = {
            name: Secret(value, f"The engine option {name}")
            if isinstance(value, str) and isinstance(name, str) and names_a_secret(name)
            else value
            for name, value in options.items()
        }


def _check_objects(values: Mapping[str, Any]) -> None:
    """Arguments whose types need imports: only looked at if they are given."""
    options, host = values["engine_options"], values["host"]
    if options is not None:
        from polydraft.contract.backend import EngineOptions

        if not isinstance(options, Mapping | EngineOptions):
            # The value is not shown: it may hold a secret.
            raise InvalidRequestError(
                "`engine_options` is of the wrong type.", "Give a dict.", argument="engine_options"
            )
        if isinstance(options, Mapping):
            for name in options:
                if not isinstance(name, str):
                    raise InvalidRequestError(
                        f"`engine_options` has the key {shown(name)}, which is not a name.",
                        "Give a dict from names to values.",
                        argument="engine_options",
                    )
    if host is not None:
        from polydraft._plugins import PluginHost

        if not isinstance(host, PluginHost):
            raise _not_understood("host", host, "a PluginHost")


def _check_k(k: object) -> None:
    if k is None or k == "auto":
        return
    name = "num_speculative_tokens"
    if not _is_int(k):
        raise _not_understood(name, k, f"a whole number from 1 to {MAX_SPECULATIVE_TOKENS}, or 'auto'")
    if k == 0:
        raise InvalidRequestError(
            f"`{name}=0` drafts nothing.", "Use `drafter=None` for plain decoding.", argument=name
        )
    if not 1 <= k <= MAX_SPECULATIVE_TOKENS:
        raise InvalidRequestError(
            f"`{name}={shown(k)}` is out of range.",
            f"Give 1 to {MAX_SPECULATIVE_TOKENS}, the bonus token excluded; 4 is a good start.",
            argument=name,
        )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _not_understood(name: str, value: object, wanted: str) -> InvalidRequestError:
    return InvalidRequestError(f"`{name}={shown(value)}` is not understood.", f"Give {wanted}.", argument=name)
