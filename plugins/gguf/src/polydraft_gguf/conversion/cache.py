"""Converted checkpoints, each written once and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from importlib.metadata import version
from pathlib import Path

from polydraft.caches import CacheFolder
from polydraft.checkpoints.contents import content_digest
from polydraft.checkpoints.safetensors import weight_files

from polydraft_gguf.conversion.write import WeightType, convert
from polydraft_gguf.plugin import CONVERSIONS

__all__ = ["converted"]

_progress = logging.getLogger("polydraft.progress")

_VERSION = 2
"""Incremented whenever the converter writes something else than before."""


def converted(folder: Path, weights: WeightType) -> Path:
    """The GGUF file of a checkpoint; written on first use, and again when a byte of the checkpoint changes.

    The cache is ``llama_cpp`` in polydraft's cache folder, or the folder that POLYDRAFT_LLAMA_CPP_CACHE names.

    Raises:
        UnsupportedError: The checkpoint is of a kind that is not converted here.
        ModelFormatError: A file of the checkpoint is missing or damaged.
        PolydraftError: The disk is full, or the file cannot be written.
    """
    return CacheFolder(*CONVERSIONS).file(f"{_key(folder)}-{weights}.gguf", partial(_write, folder, weights))


def _write(folder: Path, weights: WeightType, file: Path) -> None:
    _progress.info("Converting %s to GGUF, %s", folder.name, weights)
    convert(folder, file, weights)


def _is_read(path: Path) -> bool:
    return path.suffix in {".json", ".jinja"} and path.name[0] != "." and path.is_file()


def _key(folder: Path) -> str:
    """By content: the same bytes in another folder are the same conversion."""
    named = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    read = [*weight_files(folder), *filter(_is_read, named)]
    content = content_digest({path.relative_to(folder).as_posix(): path for path in read})
    return hashlib.sha256(f"{_VERSION} {version('gguf')} {content}".encode()).hexdigest()[:32]
