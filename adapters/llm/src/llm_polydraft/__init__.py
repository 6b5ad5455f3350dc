"""polydraft's models for the ``llm`` command and library (https://llm.datasette.io).

``polydraft/TARGET`` is a known target that an installed engine runs, such as ``polydraft/google/gemma-4-E4B-it``;
``polydraft`` runs what its option ``target`` names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import llm

from llm_polydraft.models import AsyncPolydraftModel, PolydraftModel
from llm_polydraft.options import AnyTargetOptions, PolydraftOptions
from llm_polydraft.sessions import close_sessions

__all__ = [
    "AnyTargetOptions",
    "AsyncPolydraftModel",
    "PolydraftModel",
    "PolydraftOptions",
    "close_sessions",
    "register_models",
]


@llm.hookimpl
def register_models(register: Callable[..., Any]) -> None:
    """Add ``polydraft``, and the known targets that run here. No engine is imported."""
    register(PolydraftModel(), AsyncPolydraftModel())
    for target in _targets():
        register(PolydraftModel(target), AsyncPolydraftModel(target))


def _targets() -> list[str]:
    """The known targets that an installed engine runs; those of the user's own file of pairs come first."""
    import polydraft
    from polydraft.errors import PolydraftError

    try:
        return [*dict.fromkeys(pair.target for pair in polydraft.pairs() if pair.backends)]
    except PolydraftError as error:  # such as a broken file of pairs, which must not stop llm's other models
        warnings.warn(f"polydraft's models are not listed: {error}", stacklevel=2)
        return []
