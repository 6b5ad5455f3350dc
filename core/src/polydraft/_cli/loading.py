"""From the command line's options to ``polydraft.load`` and to the settings of a generation."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polydraft._cli.streams import waiting_for
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft._session.session import Session

__all__ = [
    "DEFAULT_MODEL",
    "LoadOptions",
    "check_settings",
    "model_or_builtin",
    "open_session",
    "parse_engine_options",
    "parse_numbers",
]

_OPTIONS = {"banned_token_ids": "--ban-token", "forced_token_ids": "--force-token"}
DEFAULT_MODEL = "builtin:tiny-e2b"
"""What runs where no model is named."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What the user asked to load; the names are ``polydraft.load``'s."""

    model: str | None
    drafter: str | None
    plain: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``load``, as they are."""

    @property
    def load_drafter(self) -> str | None:
        """``drafter`` as ``load`` takes it.

        Plain decoding loads none, unless one was named: then the pair is loaded, and the generation does without.
        """
        if self.drafter is None:
            return None if self.plain else "auto"
        return None if self.drafter.lower() == "none" else self.drafter


def open_session(wish: LoadOptions) -> Session:
    """Load what was asked for.

    Raises:
        InvalidRequestError: No model is named and the built-in pair is not installed, or as ``load`` says.
        PolydraftError: As ``load`` says.
    """
    import polydraft

    model = model_or_builtin(wish.model)
    # huggingface_hub's warnings are of retries; what comes of them is told in one line.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    with waiting_for(f"Loading {model}"):
        return polydraft.load(model, drafter=wish.load_drafter, **wish.options)


def model_or_builtin(model: str | None) -> str:
    """The model that is named, else the built-in target.

    Raises:
        InvalidRequestError: None is named, and the built-in pair is not installed.
    """
    if model:
        return model
    from polydraft._plugins import default_host

    if DEFAULT_MODEL.removeprefix("builtin:") not in default_host().local_models():
        raise InvalidRequestError(
            "No --model is given, and the built-in pair is not installed.",
            "Give --model, or pip install 'polydraft[transformers,builtin]'.",
        )
    return DEFAULT_MODEL


def parse_engine_options(given: Iterable[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` to a dict; a value that is JSON is taken as such, another one as text.

    Raises:
        InvalidRequestError: There is no ``=``, or a name twice.
    """
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidRequestError(f"--engine-option {text!r} is not NAME=VALUE.", "For example name=4.")
        if name in options:
            raise InvalidRequestError(f"--engine-option {name} is given twice.", "Give it once.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def parse_numbers(option: str, given: Iterable[str] | None, kind: type[int] | type[float]) -> dict[int, Any] | None:
    """``ID=NUMBER`` to a dict; None where nothing is given.

    Raises:
        InvalidRequestError: It is not of this form, or an id is given twice.
    """
    numbers: dict[int, Any] = {}
    for text in given or ():
        key, _, value = text.partition("=")
        try:
            entry, number = int(key), kind(value)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise InvalidRequestError(
                f"{option} {text!r} is not understood.", f"Give a whole number, = and {wanted}."
            ) from error
        if entry in numbers:
            raise InvalidRequestError(f"{option} {entry} is given twice.", "Give it once.")
        numbers[entry] = number
    return numbers or None


def check_settings(**settings: Any) -> dict[str, Any]:
    """The settings that were given, checked before anything is loaded.

    Raises:
        InvalidRequestError: One is out of range.
    """
    from polydraft._session.settings import effective_settings

    given = {name: value for name, value in settings.items() if value is not None and value is not False}
    try:
        effective_settings(given, vocab_size=None)
    except InvalidRequestError as error:
        name = error.message.partition(" ")[0]
        option = _OPTIONS.get(name, f"--{name.replace('_', '-')}") if name in given else name
        raise InvalidRequestError(option + error.message.removeprefix(name), error.hint) from error
    return given
