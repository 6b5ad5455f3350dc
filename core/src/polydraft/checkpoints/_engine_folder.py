"""A folder that an engine may search for weights itself: it finds those that were checked, and no others."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polydraft.checkpoints._output_head import corrected_config
from polydraft.checkpoints._weight_files import (
    INDEX,
    SINGLE,
    Weights,
    folders_of_links,
    is_hidden,
    is_misleading,
    weights_of,
)
from polydraft.checkpoints.safetensors import header
from polydraft.errors import InvalidRequestError
from polydraft.files import read_json

__all__ = ["engine_folder"]

CONFIG = "config.json"
_USUAL_SHARD = re.compile(r"model[^/\\]*\.safetensors")
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".index.json")
_TEMPLATES = "additional_chat_templates"
"""The one folder inside a checkpoint that Transformers reads."""


def engine_folder(folder: Path) -> Path:
    """A folder from which every engine loads the weights of ``folder``, which have been checked, and nothing else.

    That is ``folder`` itself where its files have their usual names, its config agrees with its weights, and no others
    are there that an engine may take for weights. Otherwise, and where its path has characters that are patterns to
    some engines (``[``), it is a folder of links in the user's cache: the weights under their usual names, the config
    corrected, and all other files but hidden ones and other weights. It is made once, and removed when another is made
    after ``folder`` is gone: commands that were printed stay valid, and engines find what they have cached for it.

    Raises:
        InvalidRequestError: Links to the files cannot be made.
        ModelFormatError: As ``weight_files``.
    """
    weights, config = weights_of(folder), corrected_config(folder)
    why = "its config.json does not agree with its weights" if config else _unfit(folder, weights)
    if not why:
        return folder
    root = folders_of_links()
    links, texts = _contents(folder, weights)
    if config:
        del links[CONFIG]
        texts[CONFIG] = config
    digest = hashlib.sha256(json.dumps([str(folder.absolute()), texts, sorted(links.items())]).encode())
    # The folder's own name last: engines show it, and Transformers keeps a checkpoint's code under it.
    name = Path(os.path.abspath(folder)).name  # noqa: PTH100 - resolve() would follow links to other names
    made = root / digest.hexdigest()[:16] / (re.sub(r"[^\w.-]", "_", name) or "model")
    if not _is_made(made, links, texts):
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_orphans(root)
            _make(made, links, texts)
        except OSError as error:
            raise InvalidRequestError(
                f"{folder} is not given to an engine as it is, because {why}, and no folder of links to its files can "
                f"be made in {root}: {error}.",
                "Rename it, move what is not the model's elsewhere, or set XDG_CACHE_HOME to a folder for the links.",
            ) from error
    return made


def _unfit(folder: Path, weights: Weights) -> str:
    """Why engines may load other files than ``weights`` from a folder, as part of a sentence; empty if none does."""
    path = str(folder.absolute())
    if glob.has_magic(path):
        return "its path has a character of patterns ([, * or ?)"
    names = {str(file.relative_to(folder)) for file in weights.files}
    if weights.weight_map is None:
        usual = names == {SINGLE}
    else:
        usual = names == {SINGLE} or (SINGLE not in names and all(map(_USUAL_SHARD.fullmatch, names)))
        # Transformers fails without ``metadata``, which says nothing that is needed.
        usual = usual and set(weights.weight_map.values()) == names and isinstance(_read(folder).get("metadata"), dict)
    if not usual:
        return f"its weights have unusual names ({', '.join(sorted(names)[:3])})"
    others = sorted(
        entry.name for entry in folder.iterdir() if is_misleading(entry.name) and entry.name not in names
    ) or [str(found.relative_to(folder)) for found in folder.glob("*/consolidated*.safetensors")]
    return f"it also holds {others[0]}" if others else ""


def _read(folder: Path) -> Mapping[str, Any]:
    data = read_json(folder / INDEX)
    return data if isinstance(data, Mapping) else {}


def _contents(folder: Path, weights: Weights) -> tuple[dict[str, str], dict[str, str]]:
    """Path in the folder of links -> file that it leads to; and name -> text of a file that is written."""
    links = {
        str(entry.relative_to(folder)): str(entry.resolve())
        for entry in [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")]
        if entry.is_file() and not is_hidden(entry.name) and not entry.name.endswith(_OTHER_WEIGHTS)
        if not is_misleading(entry.name)
    }
    if len(weights.files) == 1:
        return links | {SINGLE: str(weights.files[0].resolve())}, {}
    weight_map: dict[str, str] = {}
    for number, file in enumerate(weights.files, 1):
        name = f"model-{number:05}-of-{len(weights.files):05}.safetensors"
        links[name] = str(file.resolve())
        weight_map.update(dict.fromkeys(sorted(header(file).keys() - {"__metadata__"}), name))
    return links, {INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)}


def _is_made(made: Path, links: Mapping[str, str], texts: Mapping[str, str]) -> bool:
    """Whether the folder of links is there as it should be; a user may have changed it."""
    try:
        found = {str(path.relative_to(made)) for path in made.rglob("*") if not path.is_dir()}
        return (
            found == {*links, *texts}
            and all((made / name).samefile(file) for name, file in links.items())
            and all((made / name).read_text(encoding="utf-8") == text for name, text in texts.items())
        )
    except OSError:
        return False


def _make(made: Path, links: Mapping[str, str], texts: Mapping[str, str]) -> None:
    scratch = Path(tempfile.mkdtemp(dir=made.parents[1]))
    try:
        folder = scratch / made.name
        folder.mkdir()
        for name, file in links.items():
            (folder / name).parent.mkdir(exist_ok=True)
            _link(Path(file), folder / name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        try:
            scratch.replace(made.parent)
        except OSError:  # it is there: made by another process meanwhile, or changed by the user
            if not _is_made(made, links, texts):
                shutil.rmtree(made.parent)
                scratch.replace(made.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _link(file: Path, place: Path) -> None:
    try:
        place.symlink_to(file)
    except (OSError, NotImplementedError):  # Windows, for most users: on one disk, hard links need no permission
        os.link(file, place)


def _remove_orphans(root: Path) -> None:
    """Remove folders whose links lead nowhere: the model has been moved or deleted."""
    for made in root.glob("*/*"):
        if any(path.is_symlink() and not path.exists() for path in made.glob("*.safetensors")):
            shutil.rmtree(made.parent, ignore_errors=True)
