"""Arguments that are declared once, as a ``TypedDict``, and taken by several functions as ``**arguments``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["shows_arguments"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_arguments(arguments: type, defaults: Mapping[str, Any]) -> Callable[[_Function], _Function]:
    """Make ``help`` and completion show each argument of a function that takes ``**arguments: Unpack[...]``.

    Args:
        arguments: The ``TypedDict``.
        defaults: Name -> default; the others default to None.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        parameters = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        for name, kind in arguments.__annotations__.items():
            text = getattr(kind, "__forward_arg__", kind)
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=text)
            )
        # ``inspect.signature`` reads this attribute, which the types of functions do not have (PEP 362).
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate
