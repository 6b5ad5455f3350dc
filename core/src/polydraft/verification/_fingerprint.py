"""A fingerprint that identifies a model's weights without reading gigabytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._names import repository
from polydraft.checkpoints.gguf_files import parts_of

if TYPE_CHECKING:
    from polydraft.contract.requests import HubOptions, ModelSource

__all__ = ["fingerprint"]

_WHOLE = 64 << 20
"""Files up to this many bytes are hashed in full."""
_PARTS, _PART = 64, 64 << 10
"""Of larger files this many parts are hashed, of this many bytes each, evenly spaced; with size and time of change."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint(source: ModelSource, hub: HubOptions) -> str | None:
    """The commit of a Hub model, or a hash over the files of a local one: links count as what they lead to.

    Args:
        source: The resolved model; at least the config of a Hub model has been downloaded.
        hub: Says where the Hub's cache is.

    Returns:
        None for a Hub model that is not in the cache: its commit is not known.
    """
    if source.path is None:
        return _commit(repository(source.id), source.revision, hub)
    digest = hashlib.sha256()
    if source.path.is_file():
        files = [part for part in parts_of(source.path) if part.is_file()]
    else:
        files = sorted(path for path in source.path.rglob("*") if path.is_file() and _counts(path, source.path))
    for path in files:
        # Zero bytes end names and sizes: otherwise different lists of files could give the same bytes.
        digest.update(f"{path.relative_to(source.path.parent)}\0".encode())
        _add(digest, path)
    return f"sha256:{digest.hexdigest()}"


def _counts(path: Path, folder: Path) -> bool:
    """Whether a file can change the model: hidden files and Markdown cannot."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() != ".md"


def _add(digest: hashlib._Hash, path: Path) -> None:
    status = path.stat()
    digest.update(f"{status.st_size}\0".encode())
    with path.open("rb") as file:
        if status.st_size <= _WHOLE:
            while block := file.read(1 << 20):
                digest.update(block)
            return
        # A change between the parts that are hashed would not show otherwise.
        digest.update(f"{status.st_mtime_ns}\0".encode())
        for part in range(_PARTS):
            # The first part starts the file, and the last one ends it.
            file.seek((status.st_size - _PART) * part // (_PARTS - 1))
            digest.update(file.read(_PART))


def _commit(repo: str, revision: str | None, hub: HubOptions) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if revision and _COMMIT.fullmatch(revision):
        return revision
    cache = Path(hub.cache_dir or constants.HF_HUB_CACHE)
    # The cache stores the commit of each branch or tag in ``refs/<name>``.
    reference = cache / repo_folder_name(repo_id=repo, repo_type="model") / "refs" / (revision or "main")
    try:
        return reference.read_text(encoding="utf-8").strip()
    except OSError:
        return None
