"""Fetch the files of a resolved model, and check that they are complete. Plugins call this in ``load_engine``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints import safetensors
from polydraft.checkpoints._hub import hub_errors
from polydraft.checkpoints._names import repository
from polydraft.contract.requests import HubOptions
from polydraft.errors import ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract.requests import ModelSource

__all__ = ["SAFETENSORS_PATTERNS", "fetch"]

SAFETENSORS_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""The files of a checkpoint in the layout of Transformers."""


def fetch(
    source: ModelSource, hub: HubOptions | None = None, *, patterns: Sequence[str] = SAFETENSORS_PATTERNS
) -> Path:
    """Make the files of a model present, and return the folder that holds them.

    A Hub model is downloaded into the Hub's cache, with ``huggingface_hub``'s progress bar on stderr; an interrupted
    download continues where it stopped. A local folder is only checked. ``source.revision`` decides the revision: the
    one in ``hub`` belongs to the target, and a drafter has its own.

    Args:
        source: The resolved model.
        hub: How to reach the Hub.
        patterns: Glob patterns of the files that the engine needs.

    Returns:
        The folder; for a source that is a single local file, that file.

    Raises:
        ModelNotFoundError: Offline, gated, or not there (any more).
        ModelFormatError: A weight file is missing or cut short.
    """
    hub = (hub or HubOptions()).model_copy(update={"revision": source.revision})
    if source.kind != "hub":
        if source.path is None or not source.path.exists():
            raise ModelNotFoundError(f"{source.id} is no longer at {source.path}.", "Check the path.")
        folder = source.path
    else:
        repo = repository(source.id)
        with hub_errors(repo, hub):
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(repo, allow_patterns=list(patterns), **hub.arguments()))
    if folder.is_dir():
        _check(folder, source, patterns)
    return folder


def _check(folder: Path, source: ModelSource, patterns: Sequence[str]) -> None:
    if source.format in {"safetensors", "mlx"} and any("safetensors" in pattern for pattern in patterns):
        safetensors.check_folder(folder)
    elif source.file and not any(folder.glob(source.file)):
        raise ModelFormatError(
            f"{source.id} has no file {source.file!r}.", "Look at the model's files, and name one that is there."
        )
