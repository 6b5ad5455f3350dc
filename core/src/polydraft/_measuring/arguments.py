"""Arguments that ``tune`` and ``bench`` share, checked; and the bench that measures for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._measuring.here import BenchHere
from polydraft._measuring.processes import BenchInProcesses
from polydraft._measuring.prompts import MeasuredPrompt, built_in_prompts, given_prompts, read_prompts
from polydraft._numbers import MOST_SECONDS, as_int, as_seconds, shown
from polydraft._plugins import default_host
from polydraft._probes.interpreter import own_python
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polydraft._measuring.bench import Bench
    from polydraft._plugins import PluginHost

__all__ = [
    "LOAD_LIMIT",
    "checked_backends",
    "checked_prompts",
    "checked_seconds",
    "checked_tokens",
    "classes",
    "open_bench",
]

LOAD_LIMIT = 600.0
"""Seconds after which an engine that has not been loaded is given up."""
_MOST_TOKENS = 1 << 20


def open_bench(target: str | Path, given: Mapping[str, Any], *, named: bool, load_limit: float) -> Bench:
    """A bench with a process for each engine; in this one with a host of the caller's own: no other has its plugins.

    Args:
        target: As for ``load``.
        given: All arguments of ``load``, checked.
        named: Whether the caller named the backends.
        load_limit: Seconds that an engine may take to load.
    """
    host: PluginHost | None = given["host"]
    own = own_python()
    if host is not None or own is None:
        return BenchHere(target, given, host or default_host(), named=named)

    def python(backend: str) -> Path:
        home = default_host().home(backend)
        return home.python if home else own

    return BenchInProcesses(target, given, named=named, load_limit=load_limit, python=python)


def checked_backends(backends: Any, host: PluginHost) -> list[str]:
    """The names, each once.

    Raises:
        InvalidRequestError: It is no list of names.
        BackendNotFoundError: There is no such backend.
    """
    names = [] if isinstance(backends, str) or not isinstance(backends, Iterable) else [*backends]
    if not names or not all(isinstance(name, str) for name in names):
        raise InvalidRequestError(
            f"`backends={shown(backends)}` is not understood.", "Give a list of names.", argument="backends"
        )
    for name in names:
        host.backend(name)  # unknown: an error with what is meant
    return list(dict.fromkeys(names))


def checked_prompts(given: Any) -> tuple[MeasuredPrompt, ...]:
    """The built-in prompts, those of a file, or those that are given.

    Raises:
        InvalidRequestError: There are none, or one is not a prompt.
    """
    if given is None:
        return built_in_prompts()
    if isinstance(given, str | Path):
        return read_prompts(Path(given).expanduser())
    return given_prompts(given)


def classes(prompts: Iterable[MeasuredPrompt]) -> dict[str, int]:
    """Class -> number of prompts."""
    found: dict[str, int] = {}
    for one in prompts:
        found[one.kind] = found.get(one.kind, 0) + 1
    return found


def checked_seconds(name: str, given: object) -> float:
    """A positive number of seconds, at most ``MOST_SECONDS``.

    Raises:
        InvalidRequestError: It is none.
    """
    seconds = as_seconds(given)
    if seconds is None:
        raise InvalidRequestError(
            f"`{name}={shown(given)}` is not a number of seconds.",
            f"Give a positive number of at most {MOST_SECONDS:.0f}.",
            argument=name,
        )
    return seconds


def checked_tokens(given: object) -> int:
    """A length of outputs.

    Raises:
        InvalidRequestError: It is none that can be measured.
    """
    number = as_int(given)
    if number is None or not 2 <= number <= _MOST_TOKENS:
        raise InvalidRequestError(
            f"`max_new_tokens={shown(given)}` is not a length of outputs to measure.",
            "Give a whole number of at least 2.",
            argument="max_new_tokens",
        )
    return number
