"""From the command line's options to arguments of ``polydraft.load`` and of ``Session.generate``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._cli.prompts import given_text, read_file
from polydraft._cli.waiting import waiting_for
from polydraft._flags import FLAGS
from polydraft._numbers import shown
from polydraft.errors import InvalidRequestError
from polydraft.secrets import names_a_secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from polydraft._session.session import Session

__all__ = ["checked_settings", "load_arguments", "open_session"]

_GUIDED = ("json", "regex", "grammar", "choice")
_GUIDED_FORMS = "Give json=SCHEMA, regex=TEXT or grammar=TEXT once, or choice=TEXT for each choice; @FILE reads a file."
_DEFAULT_MODEL = "builtin:tiny-e2b"
"""The built-in pair that runs where no model is named, if the backend loads it."""


def load_arguments(loading: Mapping[str, Any], *, plain: bool = False) -> tuple[str, dict[str, Any]]:
    """The target and the further arguments of ``load``, from the options of the same names.

    ``plain`` loads no drafter.

    Raises:
        InvalidRequestError: No model is named and the built-in pair is not installed; a drafter or k is given with
            ``plain``; or an engine option is a secret, or not of the form ``NAME=VALUE``.
    """
    drafter = loading["drafter"]
    if plain and loading["num_speculative_tokens"] is not None:
        raise InvalidRequestError(
            "-k has no effect with --plain, which decodes without speculation.", "Leave one of them out."
        )
    if plain and drafter is not None and drafter.lower() != "none":
        raise InvalidRequestError(
            "--drafter has no effect with --plain, which decodes without speculation.", "Leave one of them out."
        )
    if drafter is None:
        drafter = "none" if plain else "auto"
    _refuse_secrets(loading)
    arguments = {
        **loading,
        "drafter": None if drafter.lower() == "none" else drafter,
        "num_speculative_tokens": _count_or_text(loading["num_speculative_tokens"]),
        "engine_options": _pairs("engine_options", loading["engine_options"], _json_or_text),
    }
    target = arguments.pop("target")
    return _builtin_pair(arguments["backend"]) if target is None else target, arguments


def _count_or_text(text: str | None) -> int | str | None:
    """A number of tokens, or what is none, for ``load`` to judge."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def _refuse_secrets(loading: Mapping[str, Any]) -> None:
    """Refuse engine options that are secrets, without showing them."""
    for text in loading["engine_options"] or ():
        name = re.split(r"[=:\s]", text.strip(), maxsplit=1)[0]
        if names_a_secret(name):
            raise InvalidRequestError(
                f"{FLAGS['engine_options'][0]} does not take {name}: other users can read command lines.",
                _place_for_secrets(loading["backend"]),
            )


def _place_for_secrets(backend: str) -> str:
    """Where a backend's key is given instead."""
    from polydraft._plugins import default_host
    from polydraft.engine_parts.server_options import ServerOptions

    options = default_host().backend(backend).options if backend in default_host().backends() else None
    if options is not None and issubclass(options, ServerOptions) and options.key_variables:
        return f"Set the environment variable {options.key_variables[0]}, or give api_key_file=FILE."
    return "Set the environment variable that holds it; for the Hub, that is HF_TOKEN."


def open_session(target: str, arguments: Mapping[str, Any]) -> Session:
    """Load what was asked for; errors are those of ``load``."""
    import polydraft

    with waiting_for(f"Loading {target}"):
        return polydraft.load(target, **arguments)


def _builtin_pair(backend: str) -> str:
    """The default model, or another pair of a plugin, in a format that the backend loads (one of several, or any)."""
    from polydraft._plugins import default_host
    from polydraft._registry.backends import usual_install

    host = default_host()
    records, models = host.backends(), {f"builtin:{name}": model for name, model in host.local_models().items()}
    named = [records[name] for name in map(str.strip, backend.split(",")) if name in records]
    formats = {form for record in named or records.values() for form in record.formats}
    for target in (_DEFAULT_MODEL, *(pair.target for _, pair in host.pairs())):
        if target in models and models[target].format in formats:
            return target
    if _DEFAULT_MODEL not in models:
        raise InvalidRequestError(
            "No --model is given, and the built-in pair is not installed.",
            f"Give --model, or install an engine, which brings the pair along: {usual_install()}",
        )
    return _DEFAULT_MODEL


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, as arguments of ``generate``, checked before anything is loaded.

    Raises:
        InvalidRequestError: One is not understood or out of range.
    """
    from polydraft._session.settings import effective_settings

    parsed = {
        **settings,
        "stop": [given_text("--stop", text) for text in settings["stop"] or ()],
        "logit_bias": _pairs("logit_bias", settings["logit_bias"], float, int),
        "forced_token_ids": _pairs("forced_token_ids", settings["forced_token_ids"], int, int),
        "guided": _guided(settings["guided"]),
    }
    # Flags and lists that are not given arrive as False and [].
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in parsed.items()
        if value is not None and value is not False and value != []
    }
    effective_settings(given, vocab_size=None)
    return given


def _guided(given: Iterable[str] | None) -> dict[str, Any] | None:
    """``KIND=VALUE`` to the argument; a value ``@FILE`` is read from the file."""
    found: dict[str, Any] = {}
    for text in given or ():
        kind, _, value = given_text(FLAGS["guided"][0], text).partition("=")
        if kind not in _GUIDED or not value.strip() or (found and (kind != "choice" or "choice" not in found)):
            raise InvalidRequestError(f"{FLAGS['guided'][0]} {shown(text)} is not understood.", _GUIDED_FORMS)
        if value.startswith("@"):
            value = read_file(Path(value[1:]), FLAGS["guided"][0])
        if kind == "json":
            _check_schema(value)
        if kind == "choice":
            found.setdefault("choice", []).append(value)
        else:
            found[kind] = value
    return found or None


def _check_schema(text: str) -> None:
    from polydraft._session.guided import guided_of

    try:
        guided_of({"json": text}, None)
    except InvalidRequestError as error:  # its hint is for Python
        raise InvalidRequestError(error.message, "Give json=SCHEMA, a schema as JSON text, or json=@FILE.") from error


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
    except RecursionError as error:
        raise InvalidRequestError("An engine option is nested too deeply.", "Give fewer levels of brackets.") from error


def _pairs(
    argument: str, given: Iterable[str] | None, of_value: Any, of_key: type[str] | type[int] = str
) -> dict[Any, Any] | None:
    """``KEY=VALUE`` to a dict; None where nothing is given."""
    flag = FLAGS[argument][0]
    pairs: dict[Any, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        try:
            if not equals or not key.strip():
                raise ValueError
            entry, number = of_key(key), of_value(value)
        except InvalidRequestError:
            raise
        except ValueError as error:
            form = "NAME=VALUE" if of_key is str else f"a whole number, =, and a {'whole ' * (of_value is int)}number"
            example = "num_threads=4" if of_key is str else "7=4"
            raise InvalidRequestError(f"{flag} {shown(text)} is not {form}.", f"For example {example}.") from error
        if entry in pairs:
            raise InvalidRequestError(f"{flag} {entry} is given twice.", "Give it once.")
        pairs[entry] = number
    return pairs or None
