"""Which files of a folder are its weights: one decision, for the checks and for every engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from polydraft._folders import cache_folder
from polydraft.errors import ModelFormatError
from polydraft.files import read_json, system_errors

__all__ = [
    "INDEX",
    "SINGLE",
    "Weights",
    "check_exists",
    "check_place",
    "folders_of_links",
    "ignored_files",
    "is_hidden",
    "is_misleading",
    "may_be_weights",
    "weight_files",
    "weights_of",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SUFFIX = ".safetensors"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_NO_MODEL = {"consolidated", "adapter", "adapters", "lora", "optimizer"}
"""A file with one of these words in its name holds something else, or the same weights in another layout."""
_AGAIN = "Download the model again; an interrupted download continues where it stopped."


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a folder."""

    files: tuple[Path, ...]
    """By name; empty if the folder holds no safetensors weights."""
    weight_map: Mapping[str, str] | None = None
    """Tensor -> path inside the folder, as the index lists them; None without an index."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that are its weights, by name; empty if there are none.

    The index decides. Without one it is ``model.safetensors`` or the complete set of shards ``model-00001-of-0000N``;
    without either, the one other complete set or single file. Hidden files, optimizer states, adapters and
    ``consolidated.*`` (Mistral's own layout) never count.

    Raises:
        ModelFormatError: The index cannot be read, a file is missing or outside the folder, or several sets fit.
    """
    return list(weights_of(folder).files)


def weights_of(folder: Path) -> Weights:
    """As ``weight_files``, with the index."""
    index = folder / INDEX
    if index.is_file() or index.is_symlink():
        return _listed(folder, index)
    # A link to nothing counts, so that its message names it.
    names = sorted(entry.name for entry in folder.iterdir() if may_be_weights(entry.name) and not entry.is_dir())
    files = tuple(folder / name for name in _one_set(folder, names))
    for file in files:
        check_place(folder, file)
    return Weights(files)


def ignored_files(folder: Path) -> list[str]:
    """Names of the files of a folder that look like weights or an adapter and are not loaded; without hidden ones."""
    names = {file.name for file in weight_files(folder)}
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_file() and not is_hidden(entry.name) and is_misleading(entry.name) and entry.name not in names
    )


def is_misleading(name: str) -> bool:
    """Whether an engine that looks for weights itself may take a file of this name for some."""
    return name.endswith(_SUFFIX) or name.startswith("adapter_")


def is_hidden(name: str) -> bool:
    """Whether a path is that of a hidden file, or of one in a hidden folder; ``..`` counts as hidden."""
    # Windows' rules: they split at both separators, and a folder may be moved there.
    return any(part.startswith(".") for part in PureWindowsPath(name).parts)


def check_exists(file: Path) -> None:
    """Refuse a file that is not there.

    Raises:
        ModelFormatError: It is a link to nothing, or no regular file.
    """
    if not file.is_file():
        what = f"a link to {file.readlink()}, which is not there" if file.is_symlink() else "not a file"
        raise ModelFormatError(f"{file} is {what}.", "Put the file itself there, or download the model again.")


def check_place(folder: Path, file: Path) -> None:
    """Refuse a file that is not there, or lies outside ``folder``.

    Links may lead from the Hub's snapshots to its blobs, and from folders that polydraft has made to checked files.

    Raises:
        ModelFormatError: It is a link to nothing, no regular file, or a link that leads out of the folder.
    """
    check_exists(file)
    home, real = folder.resolve(), file.resolve()
    places = [home]
    # .../models--org--name/snapshots/<commit>: links lead to the repository's blobs, or to those of the whole cache.
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        places += [(parent / "blobs").resolve() for parent in home.parents[1:3]]
    if not any(real.is_relative_to(place) for place in places) and not home.is_relative_to(folders_of_links()):
        raise ModelFormatError(
            f"{file} is a link to {real}, outside the model's folder.",
            "Give the folder that holds the file, or put the file itself into this one.",
        )


def folders_of_links() -> Path:
    """Where the folders of links are that polydraft itself makes of checked files (``_engine_folder``)."""
    return (cache_folder() / "folders").resolve()


def _listed(folder: Path, index: Path) -> Weights:
    """The files that an index lists."""
    try:
        with system_errors(f"{index} cannot be read"):
            listed = read_json(index)["weight_map"]
        weight_map = {str(tensor): str(name) for tensor, name in listed.items()}
        if not weight_map:
            raise ValueError("it lists no tensors")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFormatError(
            f"{index} is not an index of safetensors files: {error!r}.", "Delete the file and download the model again."
        ) from error
    check_place(folder, index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if is_hidden(name) or PureWindowsPath(name).anchor:
            raise ModelFormatError(
                f"{index} lists {name!r}: a hidden file, or one outside the folder.", "Download the model again."
            )
        if not name.endswith(_SUFFIX):
            raise ModelFormatError(
                f"{index} lists {name!r}, which is not a safetensors file.",
                "Convert the weights: save_pretrained(folder) writes safetensors.",
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        stale = f" If {SINGLE} is the whole model, delete the index." if (folder / SINGLE).is_file() else ""
        raise _incomplete(folder, missing, len(names), stale)
    files = tuple(folder / name for name in names)
    for file in files:
        check_place(folder, file)
    return Weights(files, weight_map)


def may_be_weights(name: str) -> bool:
    """Whether a file of this name may be a model's weights."""
    words = set(re.split(r"[-_.\d]+", name.lower()))
    return name.endswith(_SUFFIX) and not is_hidden(name) and not words & _NO_MODEL


def _one_set(folder: Path, names: list[str]) -> list[str]:
    """The one complete set among names of files."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        shard = _SHARD.fullmatch(name)
        key = (shard["stem"], int(shard["count"])) if shard else (name.removesuffix(_SUFFIX), 0)
        sets.setdefault(key, []).append(name)
    # Count 0: a single file.
    missing = {key: _missing(key, found) for key, found in sets.items()}
    whole = [key for key in sets if not missing[key]]
    usual = [key for key in whole if key[0] == "model"]
    parts = next((key for key in sets if missing[key]), None)
    if parts is not None and not usual:
        raise _incomplete(folder, missing[parts], max(parts[1], 1))
    if len(usual or whole) > 1:
        listed = ", ".join(sets[key][0] + (f" and its {key[1]} parts" if key[1] else "") for key in usual or whole)
        raise ModelFormatError(
            f"{folder} holds several sets of weights, and no index says which is the model's: {listed}.",
            f"Move the others away, or add {INDEX} of the one that is meant.",
        )
    return sets[(usual or whole)[0]] if whole else []


def _missing(key: tuple[str, int], found: list[str]) -> list[str]:
    """Names of the shards that a set lacks."""
    stem, count = key
    numbers = {int(shard["number"]) for name in found if (shard := _SHARD.fullmatch(name))}
    return [f"{stem}-{number:05}-of-{count:05}{_SUFFIX}" for number in range(1, count + 1) if number not in numbers]


def _incomplete(folder: Path, missing: list[str], count: int, more: str = "") -> ModelFormatError:
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return ModelFormatError(
        f"{folder} is incomplete: {len(missing)} of {count} weight files are missing ({listed}).", _AGAIN + more
    )
