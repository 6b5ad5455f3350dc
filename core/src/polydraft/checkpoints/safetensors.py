"""Check by headers and sizes that a folder's safetensors files are complete; reads no weights."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints._weight_files import check_exists, is_hidden, weight_files, weights_of
from polydraft.errors import ModelFormatError
from polydraft.files import open_regular, parse_json, system_errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["check_folder", "count_numbers", "header", "is_read", "weight_files"]

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""
_OPTIONAL = ("token", "chat_template", "generation_config", "vocab.json", "merges.txt")
"""Parts of the names of files that a checkpoint need not have."""
_AGAIN = "Delete the file and download the model again."
_AGAIN_ALL = "Download or save the model again, into an empty folder."


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, offsets; ``__metadata__`` -> strings.

    The layout is that of https://huggingface.co/docs/safetensors: 8 bytes of length, little endian, then JSON, then the
    tensors, whose offsets count from the end of the JSON.

    Raises:
        ModelFormatError: The file is cut short, or is not a safetensors file.
    """
    try:
        with system_errors(f"{path} cannot be read"):
            return _header(path)
    except OSError as error:
        raise ModelFormatError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the file and its permissions."
        ) from error


def count_numbers(folders: Iterable[Path]) -> int:
    """How many numbers the weights in some folders are, by their headers.

    Raises:
        ModelFormatError: A file is missing or cut short.
    """
    return sum(
        math.prod(entry["shape"])
        for folder in folders
        for file in weight_files(folder)
        for name, entry in header(file).items()
        if name != "__metadata__"
    )


def is_read(name: str) -> bool:
    """Whether engines read a file of this name beside the weights, if it is there: config, tokenizer, template."""
    return not is_hidden(name) and (name == "config.json" or any(word in name for word in _OPTIONAL))


def _header(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        # Before reading: a damaged length may ask for exabytes.
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
            raise ModelFormatError(
                f"{path} is cut short or not a safetensors file: its header takes {length} bytes, the file has {size}.",
                _AGAIN,
            )
        raw = file.read(length)
    try:
        data = parse_json(raw)
        end = max((int(entry["data_offsets"][1]) for name, entry in data.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, OverflowError) as error:
        raise ModelFormatError(f"{path} is not a safetensors file: its header cannot be read.", _AGAIN) from error
    wanted = _LENGTH_BYTES + length + end
    if size < wanted:
        raise ModelFormatError(f"{path} is cut short: it has {size} of {wanted} bytes.", _AGAIN)
    return dict(data)


def check_folder(folder: Path) -> None:
    """Check the files that are the weights of ``folder`` (``weight_files``): none is missing or damaged.

    Raises:
        ModelFormatError: The folder holds no such file, one is missing, outside the folder or cut short, a tensor is
            not in the file that the index names, or is in two. Or a file of its tokenizer, chat template or
            ``generation_config.json`` is a link to nothing: without it, the model would run as if it had none.
    """
    weights = weights_of(folder)
    for entry in folder.iterdir():
        if entry.is_symlink() and is_read(entry.name):
            check_exists(entry)
    if not weights.files:
        raise ModelFormatError(
            f"{folder} holds no safetensors weights of a whole model.",
            "Download the model again, or convert its weights to safetensors.",
        )
    found: dict[str, Path] = {}
    for path in weights.files:
        for tensor in header(path).keys() - {"__metadata__"}:
            if tensor in found:
                raise ModelFormatError(
                    f"{folder} holds the tensor {tensor} twice: in {found[tensor].name} and {path.name}.", _AGAIN_ALL
                )
            found[tensor] = path
    for tensor, name in (weights.weight_map or {}).items():
        if found.get(tensor) != folder / name:
            raise ModelFormatError(
                f"The index of {folder} does not belong to its files: {name} does not hold the tensor {tensor}.",
                _AGAIN_ALL,
            )
