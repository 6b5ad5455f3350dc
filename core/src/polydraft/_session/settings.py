"""Turn a call's keyword arguments into settings, with errors that name the argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polydraft._argument_names import did_you_mean_argument
from polydraft._numbers import as_bool, as_float, as_int, shown
from polydraft._session.guided import guided_of
from polydraft.contract.requests import DEFAULT_SETTINGS, LONGEST_STOP, GenerationSettings
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.sampling._processors import processor_kind

if TYPE_CHECKING:
    from polydraft.contract.records import Capabilities

__all__ = ["check_some_token_left", "check_supported", "effective_settings"]

_LEAST_TEMPERATURE = 1e-6  # 1/T overflows float32 for T below about 1e-38
_LARGEST_BIAS = 100.0
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_OBLIGATORY = frozenset({"max_new_tokens", "stop", "stop_token_ids", "ignore_eos"})
_NUMBERS: dict[str, Callable[[Any], float | None]] = {
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "top_k", "seed", "logprobs"), as_int),
    **dict.fromkeys(("temperature", "top_p", "min_p"), as_float),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), as_float),
    "ignore_eos": as_bool,
}
_ALLOWED = {
    "max_new_tokens": "a whole number from 1 to 2**63 - 1",
    "min_new_tokens": "a whole number from 0 to `max_new_tokens`",
    "temperature": "0 (greedy), or a number from 1e-6 to 1e6",
    "top_p": "a number above 0 and at most 1",
    "top_k": "a whole number from 0 (keeps all tokens) to 2**31 - 1",
    "min_p": "a number from 0 to 1",
    "typical_p": "a number above 0 and at most 1",
    "repetition_penalty": "a number from 0.001 to 1000 (1 changes nothing)",
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "logit_bias": "a dict from token ids to numbers from -100 to 100",
    "banned_token_ids": "a sequence of token ids",
    "forced_token_ids": "a dict from indices in the output, 0 or more, to token ids",
    "logits_processor": "a function (prefix_ids, logits) -> logits, or an object with accept and rollback as well",
    "guided": "{'json': schema}, {'regex': text}, {'choice': [text, ...]} or {'grammar': text}",
    "acceptance": "'exact-match' or 'rejection'",
    "seed": "a whole number from 0 to 2**63 - 1",
    "stop": f"a string or a sequence of strings, of 1 to {LONGEST_STOP} characters each",
    "stop_token_ids": "a sequence of token ids",
    "ignore_eos": "True or False",
    "logprobs": "a whole number from 0 to 64",
}


def effective_settings(given: Mapping[str, Any], vocab_size: int | None) -> GenerationSettings:
    """The settings of a call.

    Args:
        given: The call's arguments by name; None means the default of ``GenerationSettings``.
        vocab_size: Token ids must lie below it; None if no model is loaded yet.

    Raises:
        InvalidRequestError: A setting has the wrong type or is out of range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    guided = guided_of(values.pop("guided", None), values.pop("response_format", None))
    if guided is not None:
        values["guided"] = guided
    stop = values.get("stop")
    if stop is not None:
        values["stop"] = (stop,) if isinstance(stop, str) else _sequence("stop", stop)
        if "" in values["stop"]:
            raise InvalidRequestError(
                "A stop string is empty.", "Leave it out, or give at least one character.", argument="stop"
            )
        if any(isinstance(one, str) and _LONE_SURROGATE.search(one) for one in values["stop"]):
            raise InvalidRequestError(
                "A stop string holds half of a surrogate pair, which no text contains.",
                "Decode it again, for example with errors='replace'.",
                argument="stop",
            )
        longest = max((len(one) for one in values["stop"] if isinstance(one, str)), default=0)
        if longest > LONGEST_STOP:
            raise InvalidRequestError(
                f"A stop string has {longest} characters.",
                f"Give at most {LONGEST_STOP}, such as its first ones.",
                argument="stop",
            )
    for name in ("stop_token_ids", "banned_token_ids"):
        if name in values:
            values[name] = _sequence(name, values[name])
    for name in ("logit_bias", "forced_token_ids"):
        if name in values:
            values[name] = _mapping(name, values[name])
    if "logits_processor" in values:
        processor_kind(values["logits_processor"])
    for name, convert in _NUMBERS.items():
        if name in values:
            number = convert(values[name])
            if number is None:
                raise _invalid(name, values[name])
            values[name] = number
    try:
        # strict: "5" is not a number.
        settings = GenerationSettings.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        raise _invalid(name, values.get(name)) from error
    _check_token_ids(settings, vocab_size)
    _check_values(settings)
    if settings.min_new_tokens > settings.max_new_tokens:
        raise InvalidRequestError(
            f"`min_new_tokens={shown(settings.min_new_tokens)}` is above `max_new_tokens={settings.max_new_tokens}`.",
            "Lower the first or raise the second.",
            argument="min_new_tokens",
        )
    return settings


def check_some_token_left(settings: GenerationSettings, ends: Iterable[int], vocab_size: int) -> None:
    """Refuse settings that forbid every token; those in ``ends`` are suppressed until ``min_new_tokens`` is reached.

    Raises:
        InvalidRequestError: No token could be chosen.
    """
    if len(settings.banned_token_ids) + settings.min_new_tokens < 1:
        return
    forbidden = {*settings.banned_token_ids, *(ends if settings.min_new_tokens else ())}
    if len(forbidden) >= vocab_size:
        raise InvalidRequestError(
            f"`banned_token_ids` leaves none of the model's {vocab_size} tokens to choose from.",
            "Ban fewer tokens; until `min_new_tokens` is reached, those that end the output are suppressed as well.",
            argument="banned_token_ids",
        )


def check_supported(
    settings: GenerationSettings, capabilities: Capabilities, backend: str, *, in_worker: bool = False
) -> None:
    """Refuse settings that the backend does not claim to support.

    Raises:
        UnsupportedError: A setting differs from its default and is not among the capabilities.
    """
    if settings.ignore_eos and not capabilities.ignores_eos:
        raise UnsupportedError(
            f"The backend {backend} does not support `ignore_eos`: its engine always ends at its end of sequence.",
            "Leave it out.",
        )
    for name in GenerationSettings.model_fields:
        if name in _OBLIGATORY or name in capabilities.sampling:
            continue
        value, default = getattr(settings, name), getattr(DEFAULT_SETTINGS, name)
        # By identity where the default is None: ``!=`` would call the ``__eq__`` of a user's object.
        if value is not default and (default is None or value != default):
            if name == "logits_processor" and in_worker:
                raise UnsupportedError(
                    "A `logits_processor` is code of this process, and the engine runs in a worker process.",
                    f"Load it with `isolation='none'` if the backend {backend} supports it in this process.",
                )
            raise UnsupportedError(
                f"The backend {backend} does not support `{name}`.",
                "Leave it out, or choose another backend (`polydraft backends` lists them).",
            )


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise _invalid(name, value)
    try:
        items = tuple(value)
    except TypeError:  # an array of no dimension: a number
        raise _invalid(name, value) from None
    if name == "stop":
        return items
    token_ids = tuple(as_int(item) for item in items)
    if None in token_ids:
        raise _invalid(name, value)
    return token_ids


def _mapping(name: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _invalid(name, value)
    convert = as_float if name == "logit_bias" else as_int
    pairs = [(as_int(key), convert(part)) for key, part in value.items()]
    if any(None in pair for pair in pairs):
        raise _invalid(name, value)
    return dict(pairs)


def _check_token_ids(settings: GenerationSettings, vocab_size: int | None) -> None:
    named = {
        "stop_token_ids": settings.stop_token_ids,
        "banned_token_ids": settings.banned_token_ids,
        "logit_bias": settings.logit_bias,
        "forced_token_ids": settings.forced_token_ids.values(),
    }
    for name, token_ids in named.items():
        for token_id in token_ids:
            if token_id < 0 or (vocab_size is not None and token_id >= vocab_size):
                raise InvalidRequestError(
                    f"`{name}` contains {shown(token_id)}, which is not a token of this model.",
                    "Token ids are not negative."
                    if vocab_size is None
                    else f"Token ids go from 0 to {vocab_size - 1}.",
                    argument=name,
                )


def _check_values(settings: GenerationSettings) -> None:
    if settings.temperature and not _LEAST_TEMPERATURE <= settings.temperature <= 1 / _LEAST_TEMPERATURE:
        raise _invalid("temperature", settings.temperature)
    for token_id, bias in settings.logit_bias.items():
        if not abs(bias) <= _LARGEST_BIAS:
            raise InvalidRequestError(
                f"The `logit_bias` of token {token_id} is {bias}.",
                "Give a number from -100 to 100; to forbid a token, use `banned_token_ids`.",
                argument="logit_bias",
            )
    for index, token_id in settings.forced_token_ids.items():
        if not 0 <= index < settings.max_new_tokens:
            raise InvalidRequestError(
                f"`forced_token_ids` names index {shown(index)}, and the output has {settings.max_new_tokens} tokens.",
                "The first new token has index 0; raise `max_new_tokens` for more.",
                argument="forced_token_ids",
            )
        if token_id in settings.banned_token_ids:
            raise InvalidRequestError(
                f"Token {token_id} is banned, and forced at index {index} of the output.",
                "Remove one of the two.",
                argument="forced_token_ids",
            )


def _invalid(name: str, value: Any) -> InvalidRequestError:
    if name not in _ALLOWED:
        return InvalidRequestError(
            f"There is no setting named {name}.",
            f"{did_you_mean_argument(name, _ALLOWED)} Known settings: {', '.join(_ALLOWED)}.".strip(),
            argument=name,
        )
    return InvalidRequestError(f"`{name}={shown(value)}` is not allowed.", f"Give {_ALLOWED[name]}.", argument=name)
