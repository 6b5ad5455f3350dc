"""A backend's own options, as ``load`` is given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polydraft._argument_names import argument_meant
from polydraft.checkpoints._names import did_you_mean
from polydraft.contract.backend import EngineOptions
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from polydraft.contract.records import DrafterKind

__all__ = ["check_options", "without_effect"]


def check_options(
    model: type[EngineOptions], name: str, given: Mapping[str, Any] | EngineOptions | None
) -> EngineOptions:
    """Check ``engine_options`` against the backend's own model.

    Raises:
        InvalidRequestError: An option is unknown or its value is wrong; the sentence names it and the known ones.
    """
    if isinstance(given, EngineOptions):
        if type(given) is not model:
            raise InvalidRequestError(
                f"`engine_options` is a {type(given).__name__}; the backend {name} takes {model.__name__}.",
                "Give a dict, or an instance of that class.",
                argument="engine_options",
            )
        return given
    known = sorted(model.model_fields)
    listed = f"Known options of {name}: {', '.join(known)}." if known else f"The backend {name} has no options."
    try:
        return model.model_validate(dict(given or {}))
    except ValidationError as error:
        first = error.errors()[0]
        said_by_model = first.get("ctx", {}).get("error")
        if not first["loc"] and isinstance(said_by_model, InvalidRequestError):
            raise InvalidRequestError(
                said_by_model.message, said_by_model.hint, argument="engine_options"
            ) from said_by_model
        option = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
        which = f"The option {option!r} of {name} is" if option else f"The options of {name} are"
        problem, hint = f"{which} wrong: {said}.", listed
        if first["type"] == "extra_forbidden":
            problem = f"The backend {name} has no option {option!r}."
            meant = argument_meant(option)
            other = f"`{meant}` is an argument of its own." if meant else did_you_mean(option, known)
            hint = f"{other} {listed}".strip()
        raise InvalidRequestError(problem, hint, argument="engine_options") from error


def without_effect(options: EngineOptions | None, kind: DrafterKind | None) -> InvalidRequestError | None:
    """The error for an option that was given and that only drafters of other kinds use; None: there is none.

    Args:
        options: The backend's options.
        kind: The session's kind of drafter; None: it decodes plainly.
    """
    fields = {} if options is None else type(options).model_fields
    for name in sorted(fields.keys() & (options.model_fields_set if options is not None else set())):
        extra = fields[name].json_schema_extra
        kinds = extra.get("drafters") if isinstance(extra, dict) else None
        if isinstance(kinds, list) and kind not in kinds and getattr(options, name) is not None:
            used = " or ".join(map(str, kinds))
            runs = "decodes plainly" if kind is None else f"has one of kind {kind}"
            drafter = "`drafter='ngram'`" if kinds == ["ngram"] else "such a drafter"
            return InvalidRequestError(
                f"The option {name!r} has no effect: drafters of kind {used} use it, and this session {runs}.",
                f"Leave it out, or give {drafter}.",
                argument="engine_options",
            )
    return None
