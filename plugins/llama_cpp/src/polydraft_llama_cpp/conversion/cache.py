"""Converted checkpoints, each written once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path
from polydraft.errors import InvalidRequestError
from polydraft.files import system_error

from polydraft_llama_cpp.conversion.write import WeightType, convert

__all__ = ["converted"]

_VERSION = 1
"""Incremented whenever the converter writes something else than before."""
_VARIABLE = "POLYDRAFT_LLAMA_CPP_CACHE"


def converted(folder: Path, weights: WeightType) -> Path:
    """The GGUF file of a checkpoint; written on first use, and again when a file of the checkpoint changes.

    The cache is ``llama_cpp`` in polydraft's cache folder, or the folder that POLYDRAFT_LLAMA_CPP_CACHE names.

    Raises:
        UnsupportedError: The checkpoint is of a kind that is not converted here.
        ModelFormatError: A file of the checkpoint is missing or damaged.
        SystemResourceError: The disk is full or read-only, or file handles have run out.
        InvalidRequestError: The cache folder cannot be written for another reason.
    """
    given = os.environ.get(_VARIABLE)
    cache = Path(given) if given else user_cache_path("polydraft") / "llama_cpp"
    file = cache / f"{folder.name}-{_fingerprint(folder)}-{weights}.gguf"
    if file.is_file():
        return file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that renaming is atomic: another process sees the whole file or none.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            written = Path(scratch) / file.name
            convert(folder, written, weights)
            written.replace(file)
    except OSError as error:
        if refused := system_error(error, f"{folder.name} cannot be written as GGUF into {cache}"):
            refused.hint += f" {_VARIABLE} names the folder."
            raise refused from error
        raise InvalidRequestError(
            f"The cache folder {cache} cannot be written: {error}.", f"Set {_VARIABLE} to a folder that you may write."
        ) from error
    return file


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256(f"{_VERSION}".encode())
    for path in sorted(folder.resolve().iterdir()):
        if path.suffix in {".safetensors", ".json", ".jinja"}:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
