"""Check by headers and sizes that a folder's safetensors files are complete; reads no weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from polydraft.errors import ModelFormatError
from polydraft.files import open_regular, parse_json, read_json, system_errors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_folder", "header", "weight_files"]

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""
_INDEX = "model.safetensors.index.json"
_AGAIN = "Delete the file and download the model again."


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by name: those that the index lists, or all if there is no index.

    Raises:
        ModelFormatError: The index cannot be read, or a file that it lists is missing.
    """
    index = folder / _INDEX
    if not index.is_file():
        return sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    try:
        with system_errors(f"{index} cannot be read"):
            names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFormatError(f"{index} is not an index of safetensors files: {error!r}.", _AGAIN) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelFormatError(
            f"{folder} is incomplete: {len(missing)} of {len(names)} weight files are missing ({listed}).",
            "Download the model again; an interrupted download continues where it stopped.",
        )
    return [folder / name for name in names]


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
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.", "Check the file.") from error


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
    """Check every safetensors file that belongs to the model in ``folder``.

    Raises:
        ModelFormatError: The folder holds no such file, one is missing, or one is cut short.
    """
    files = weight_files(folder)
    if not files:
        raise ModelFormatError(
            f"{folder} holds no safetensors weights.",
            "Download the model again, or convert its weights to safetensors.",
        )
    for path in files:
        header(path)
