"""A backend's own options, as ``load`` is given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from polydraft._argument_names import argument_meant
from polydraft.checkpoints._names import did_you_mean
from polydraft.contract.backend import EngineOptions
from polydraft.errors import InvalidRequestError

__all__ = ["check_options"]


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
        option = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
        problem, hint = f"The option {option!r} of {name} is wrong: {said}.", listed
        if first["type"] == "extra_forbidden":
            problem = f"The backend {name} has no option {option!r}."
            meant = argument_meant(option)
            other = f"`{meant}` is an argument of its own." if meant else did_you_mean(option, known)
            hint = f"{other} {listed}".strip()
        raise InvalidRequestError(problem, hint, argument="engine_options") from error
