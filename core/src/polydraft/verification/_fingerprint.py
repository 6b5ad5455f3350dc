"""A fingerprint of a model's weights: every byte that an engine may load, wherever it lies and however it is spelt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._names import repository
from polydraft.checkpoints.contents import content_digest, files_below, known_content_digest
from polydraft.checkpoints.gguf_files import file_at, parts_of
from polydraft.checkpoints.safetensors import weight_files
from polydraft.errors import ModelFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft.contract.requests import HubOptions, ModelSource

__all__ = ["commit_of", "fingerprint", "known_fingerprint", "snapshot_of", "state_of"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".gguf", ".litertlm")
_WORDS = {".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf"}
"""Suffixes of files about a model: no engine loads them."""


def fingerprint(source: ModelSource, hub: HubOptions) -> str:
    """A hash over the names (in the model's folder) and the contents of all files of a model.

    The first time this reads every byte; digests of large files are kept (``polydraft.checkpoints.contents``).

    Args:
        source: The resolved model.
        hub: Says where the Hub's cache is.

    Returns:
        Empty for a Hub model whose weights are not in the cache; the name of a server's model.

    Raises:
        ModelFormatError: A file is missing or cannot be read.
    """
    if source.kind == "served":  # its bytes are part of the backend's ``build``
        return source.id
    path = source.path or snapshot_of(source, hub)
    if path is None:
        return ""
    try:
        return content_digest(_files(source, path))
    except ModelFormatError:
        if source.kind == "hub":  # not completely downloaded
            return ""
        raise
    except OSError as error:
        raise ModelFormatError(
            f"{error.filename or source.id} cannot be read: {error.strerror or error}.", "Check its permissions."
        ) from error


def known_fingerprint(source: ModelSource, hub: HubOptions) -> str:
    """The same without reading large files: empty unless the digest of each was kept when it was read before."""
    if source.kind == "served":
        return source.id
    path = source.path or snapshot_of(source, hub)
    if path is None:
        return ""
    try:
        return known_content_digest(_files(source, path))
    except (ModelFormatError, OSError):
        return ""


def state_of(source: ModelSource, hub: HubOptions) -> tuple[tuple[str, int, int, int, int], ...]:
    """Names, inodes, sizes and times of the same files, read in no time: whether they changed during a load."""
    path = source.path or snapshot_of(source, hub)
    try:
        files = _files(source, path) if path else {}
        states = {name: file.stat() for name, file in files.items()}
    except (OSError, ModelFormatError):
        return ()
    return tuple(
        (name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        for name, found in sorted(states.items())
    )


def commit_of(source: ModelSource, hub: HubOptions) -> str:
    """The commit of a Hub model as the cache knows it; empty for others, and where it is not known."""
    if source.kind != "hub":
        return ""
    revision = source.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        # The cache stores the commit of each branch or tag in ``refs/<name>``.
        return (_repository_folder(source, hub) / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def snapshot_of(source: ModelSource, hub: HubOptions) -> Path | None:
    """The folder of a Hub model's files in the Hub's cache; None if it is not there."""
    if source.kind != "hub":
        return None
    folder = _repository_folder(source, hub) / "snapshots" / (commit_of(source, hub) or "unknown")
    return folder if folder.is_dir() else None


def _repository_folder(source: ModelSource, hub: HubOptions) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name: str = repo_folder_name(repo_id=repository(source.id), repo_type="model")
    return Path(hub.cache_dir or constants.HF_HUB_CACHE) / name


def _files(source: ModelSource, path: Path) -> dict[str, Path]:
    """The files that count, by name. A model of one file (or one split into parts) is known by its contents alone."""
    if source.format == "gguf":
        # As ``fetch_gguf`` chooses. Nothing else is read by an engine: a GGUF file holds the tokenizer, too.
        return _numbered(parts_of(file_at(path, source.file, source.id)))
    if not path.is_dir():
        return _numbered([path])
    found = {file.relative_to(path).as_posix(): file for file in files_below(path)}
    counted = {name: file for name, file in found.items() if _counts(file.relative_to(path))}
    weight_files(path)  # a missing or misplaced one is an error here
    if source.kind == "hub" and not any(name.endswith(_WEIGHTS) for name in counted):
        raise ModelFormatError(f"{source.id} has no weights in the cache.", "Download it.")
    return counted


def _numbered(files: Iterable[Path]) -> dict[str, Path]:
    return {f"part {number:05d}": file for number, file in enumerate(files, start=1)}


def _counts(name: Path) -> bool:
    """Whether a file can change the model: hidden files (but for weights) and words about it cannot."""
    hidden = any(part.startswith(".") for part in name.parts)
    suffix = name.suffix.lower()
    return suffix in _WEIGHTS or (not hidden and suffix not in _WORDS)
