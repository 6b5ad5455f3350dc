"""From what the user wrote to a ``ModelSource``: its config is read, its weights are not touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._from_hub import from_hub
from polydraft.checkpoints._local import local_model
from polydraft.checkpoints._names import parse
from polydraft.checkpoints.config import read_config
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from polydraft.checkpoints._names import KnownNames, Role

__all__ = ["resolve"]

_BUILTIN_HINT = "pip install 'polydraft[builtin]'"


def resolve(
    target: str | Path, *, known: KnownNames, hub: HubOptions | None = None, role: Role = "target"
) -> ModelSource:
    """Find a model and read its config.

    Of a Hub model only ``config.json`` is downloaded; its files are listed only where they decide the format.

    Args:
        target: Hub id, folder, single weight file, or ``builtin:<name>``.
        known: Built-in models and the registry's ids.
        hub: How to reach the Hub.
        role: ``target`` or ``drafter``, for the sentences of errors.

    Raises:
        ModelNotFoundError: It does not exist, may not be read, or cannot be reached.
        ModelFormatError: It exists, but is not a model of a known layout.
        InvalidRequestError: The name is neither a path nor a Hub id.
    """
    name = parse(target)
    written = str(target).strip()
    if name.kind == "builtin":
        return _builtin(name.value, written, role, known)
    if name.kind == "local":
        return local_model(Path(name.value), written, role, known)
    return from_hub(name, written, hub or HubOptions(), role, known)


def _builtin(name: str, written: str, role: Role, known: KnownNames) -> ModelSource:
    record = known.local_models.get(name)
    if record is None:
        names = ", ".join(sorted(known.local_models))
        raise ModelNotFoundError(
            f"There is no built-in {role} {name!r}.",
            known.suggest(written)
            or (f"There are: {names}." if names else f"Install the built-in pairs: {_BUILTIN_HINT}."),
        )
    folder = Path(record.path)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelFormatError(f"{written} is damaged: {config} is missing.", f"Install it again: {_BUILTIN_HINT}.")
    return ModelSource(
        id=written, kind="builtin", path=folder, format=record.format, config=read_config(config, written)
    )
