"""Fetch the files of a resolved model, and check that they are complete. Plugins call this in ``load_engine``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints import safetensors
from polydraft.checkpoints._engine_folder import engine_folder
from polydraft.checkpoints._hub import hub_errors
from polydraft.checkpoints._names import repository
from polydraft.checkpoints._weight_files import INDEX, SINGLE, is_hidden
from polydraft.contract.requests import HubOptions
from polydraft.errors import ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract.requests import ModelSource

__all__ = ["SAFETENSORS_PATTERNS", "fetch", "has_tokenizer"]

_progress = logging.getLogger("polydraft.progress")

SAFETENSORS_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""The files of a checkpoint in the layout of Transformers."""
_NEVER = ("consolidated*", "adapter_*", "optimizer*", "*/*.safetensors")
"""Glob patterns of files that match an engine's patterns and are no model's weights. ``*`` matches ``/`` too."""
_TOKENIZERS = ("vocab.json", "merges.txt", "spiece.model")
"""Tokenizer files without "token" in their names."""


def fetch(
    source: ModelSource, hub: HubOptions | None = None, *, patterns: Sequence[str] = SAFETENSORS_PATTERNS
) -> Path:
    """Make the files of a model present, check them, and return the folder to load them from.

    A Hub model is downloaded into the Hub's cache, with ``huggingface_hub``'s progress bar on stderr; an interrupted
    download continues where it stopped. A local folder is only checked. ``source.revision`` decides the revision: the
    one in ``hub`` belongs to the target, and a drafter has its own.

    Args:
        source: The resolved model.
        hub: How to reach the Hub.
        patterns: Glob patterns of the files that the engine needs.

    Returns:
        The folder; for a source that is a single local file, that file. An engine that looks for safetensors weights
        there itself finds those that were checked and no others: it is a folder of links, in the user's cache, where
        the model's own folder holds more, or has a path with ``[`` (``patterns`` without safetensors: never).

    Raises:
        ModelNotFoundError: Offline, gated, or not there (any more).
        ModelFormatError: A weight file is missing, cut short, or outside the folder.
        InvalidRequestError: Links are needed and cannot be made.
    """
    hub = (hub or HubOptions()).model_copy(update={"revision": source.revision})
    if source.kind != "hub":
        if source.path is None or not source.path.exists():
            raise ModelNotFoundError(f"{source.id} is no longer at {source.path}.", "Check the path.")
        folder = source.path
    else:
        repo = repository(source.id)
        with hub_errors(repo, hub) as reached:
            from huggingface_hub import snapshot_download

            wanted: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": list(_NEVER)}
            _progress.info("Downloading %s", repo, extra={"shows_itself": True})
            folder = Path(snapshot_download(repo, **wanted, **reached.arguments()))
    if not folder.is_dir():
        return folder
    if source.format in {"safetensors", "mlx"} and any("safetensors" in pattern for pattern in patterns):
        _check_named_weights(source)
        safetensors.check_folder(folder)
        return engine_folder(folder)
    if source.file and not (folder / source.file).is_file() and not any(folder.glob(source.file)):
        raise ModelFormatError(
            f"{source.id} has no file {source.file!r}.", "Look at the model's files, and name one that is there."
        )
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer; hidden ones do not count."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file() and not is_hidden(entry.name)]
    return any("token" in name or name in _TOKENIZERS for name in names)


def _check_named_weights(source: ModelSource) -> None:
    """Refuse a config that names its own file of weights: of all engines, only Transformers would load that one."""
    named = source.config.get("transformers_weights")
    if named not in {None, SINGLE, INDEX}:
        raise ModelFormatError(
            f"config.json of {source.id} names its own file of weights: transformers_weights is {named!r}.",
            f"Give the file its usual name ({SINGLE}), and remove that field.",
        )
