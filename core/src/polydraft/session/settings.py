"""From a call's keyword arguments to effective settings, with errors that name the argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polydraft.contract.requests import DEFAULT_SETTINGS, GenerationSettings
from polydraft.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract.records import Capabilities

__all__ = ["check_supported", "effective_settings"]

_OBLIGATORY = frozenset({"max_new_tokens", "stop", "stop_token_ids", "ignore_eos"})
_ALLOWED = {
    "max_new_tokens": "a whole number of at least 1",
    "min_new_tokens": "a whole number of at least 0, not above max_new_tokens",
    "temperature": "a number of at least 0 (0 is greedy)",
    "top_p": "a number above 0 and at most 1",
    "top_k": "a whole number of at least 0 (0 keeps all tokens)",
    "min_p": "a number from 0 to 1",
    "seed": "a whole number from 0 to 2**63 - 1",
    "stop": "a text or a sequence of texts, none of them empty",
    "stop_token_ids": "a sequence of token ids",
    "ignore_eos": "True or False",
    "logprobs": "a whole number from 0 to 64",
}


def effective_settings(given: Mapping[str, Any], vocab_size: int) -> GenerationSettings:
    """Settings of a call; what is None takes the default of ``GenerationSettings``.

    Raises:
        InvalidRequestError: A setting has the wrong type or is out of range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    stop = values.get("stop")
    if stop is not None:
        values["stop"] = (stop,) if isinstance(stop, str) else _sequence("stop", stop)
        if "" in values["stop"]:
            raise InvalidRequestError("A stop string is empty.", "Leave it out, or give at least one character.")
    if "stop_token_ids" in values:
        values["stop_token_ids"] = _sequence("stop_token_ids", values["stop_token_ids"])
    for name, value in values.items():
        if name in _ALLOWED and isinstance(value, bool) and name != "ignore_eos":
            raise _invalid(name, value)
    try:
        settings = GenerationSettings.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        raise _invalid(name, values.get(name)) from error
    for token_id in settings.stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"stop_token_ids holds {token_id}, which is no token of this model.",
                f"Token ids go from 0 to {vocab_size - 1}.",
            )
    if settings.min_new_tokens > settings.max_new_tokens:
        raise InvalidRequestError(
            f"min_new_tokens ({settings.min_new_tokens}) is above max_new_tokens ({settings.max_new_tokens}).",
            "Lower the one or raise the other.",
        )
    return settings


def check_supported(settings: GenerationSettings, capabilities: Capabilities, backend: str) -> None:
    """Refuse settings that the backend does not claim to honour.

    Raises:
        UnsupportedError: A setting differs from its default and is not among the capabilities.
    """
    for name in GenerationSettings.model_fields:
        if name in _OBLIGATORY or name in capabilities.sampling:
            continue
        if getattr(settings, name) != getattr(DEFAULT_SETTINGS, name):
            raise UnsupportedError(
                f"The backend {backend} does not honour {name}.",
                "Leave it out, or choose another backend (`polydraft backends` lists them).",
            )


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise _invalid(name, value)
    return tuple(value)


def _invalid(name: str, value: Any) -> InvalidRequestError:
    if name not in _ALLOWED:
        return InvalidRequestError(f"There is no setting named {name}.", f"Known settings: {', '.join(_ALLOWED)}.")
    return InvalidRequestError(f"{name} is {value!r}.", f"Give {_ALLOWED[name]}.")
