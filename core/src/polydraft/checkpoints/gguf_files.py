"""Choose and fetch the files of a GGUF model in a folder or repository, split models included."""

from __future__ import annotations

import logging
import re
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._hub import hub_errors, repository_files
from polydraft.checkpoints._names import repository
from polydraft.checkpoints._quantization import without_quantization
from polydraft.checkpoints._weight_files import check_place, is_hidden
from polydraft.checkpoints.config import is_assistant
from polydraft.checkpoints.gguf_config import summary_of
from polydraft.contract.requests import HubOptions
from polydraft.errors import ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polydraft.contract.requests import ModelSource

__all__ = ["choose_files", "fetch_gguf", "file_of_folder", "first_part", "parts_of"]

_progress = logging.getLogger("polydraft.progress")

_PART = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
_SUFFIX = ".gguf"
_USUAL = "q4_k_m"
_NOT_TARGETS = ("mtp-", "mmproj")
# Where the header cannot be asked. ``model-imatrix-Q4_K_M`` is a model, quantized by means of one.
_OTHER_NAME = re.compile(r"^mtp-|(?:^|[-_.])(?:mmproj(?:[-_.]|$)|imatrix\.gguf$)", re.IGNORECASE)


def fetch_gguf(source: ModelSource, hub: HubOptions | None = None) -> Path:
    """Make a GGUF model present, and return its file; of a split model the first part, with all others next to it.

    Args:
        source: The resolved model: a file, a folder, or a Hub repository with a file name or pattern.
        hub: How to reach the Hub.

    Raises:
        ModelNotFoundError: Offline, gated, or not there (any more).
        ModelFormatError: No file fits what was asked for, several do, or a part is missing.
    """
    if source.kind != "hub":
        path = source.path
        if path is None or not path.exists():
            raise ModelNotFoundError(f"{source.id} is no longer at {path}.", "Check the path.")
        return file_at(path, source.file, source.id)
    hub = (hub or HubOptions()).model_copy(update={"revision": source.revision})
    repo = repository(source.id)
    with hub_errors(repo, hub) as reached:
        from huggingface_hub import hf_hub_download

        chosen = choose_files(repository_files(repo, reached), source.file, source.id)
        _progress.info("Downloading %s", repo, extra={"shows_itself": True})
        paths = [hf_hub_download(repo, name, **reached.arguments()) for name in chosen]
    return Path(paths[0])


def file_at(path: Path, wanted: str | None, model: str) -> Path:
    """The file of a model at a path, of a split one the first part: the path itself, or what ``wanted`` names in it.

    Raises:
        ModelFormatError: As ``fetch_gguf``.
    """
    if not path.is_dir():
        return first_part(path, model)
    if wanted and (path / wanted).is_file():
        return first_part(path / wanted, model)
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return path / choose_files(names, wanted, model)[0]


def parts_of(path: Path) -> list[Path]:
    """The files of the model that a file belongs to, by its name, in order: all parts if it is one of a split model."""
    part = _part(path.name)
    if part is None:
        return [path]
    start, suffix = path.name[: part.start()], path.name[-len(_SUFFIX) :]
    return [path.with_name(f"{start}-{number:05}-of-{part['count']}{suffix}") for number in _numbers(part)]


def first_part(path: Path, model: str) -> Path:
    """The file to load for a file that was named: itself, or of a split model the first part.

    Raises:
        ModelFormatError: A part is missing.
    """
    parts = parts_of(path)
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise _parts_missing(model, len(parts), len(missing), missing[0])
    return parts[0]


def file_of_folder(folder: Path, model: str) -> str | None:
    """Name of the one GGUF model in a folder, of a split one the first part; None if there is none.

    What a file is, its header says: projectors, adapters and importance matrices are no models, and drafters count
    only if there is nothing else. Hidden files never count.

    Raises:
        ModelFormatError: There are several, a part is missing, or the file lies outside the folder.
    """
    models = _models_in(folder)
    if len(models) > 1:
        listed = [parts[0] for parts in models.values()]
        raise ModelFormatError(
            f"{model} holds {len(listed)} models: {', '.join(listed)}.", f"Name one of them: {folder / listed[0]}."
        )
    for parts in models.values():
        path = first_part(folder / parts[0], model)
        for part in parts_of(path):
            check_place(folder, part)
        return path.name
    return None


def targets_in(folder: Path) -> list[Path]:
    """The GGUF files of targets in a folder, by name; of split models the first parts.

    Raises:
        OSError: The folder cannot be read.
    """
    return [folder / parts[0] for parts in _models_in(folder).values() if _role(folder / parts[0]) == "target"]


def are_one_model(files: Sequence[Path]) -> bool:
    """Whether files differ in quantization only: by their names, and by the sizes in their headers."""
    if len({model_of(file.name) for file in files}) > 1:
        return False
    try:
        configs = [summary_of(file)[1] for file in files]
    except ModelFormatError:
        return False
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return len({tuple(config.get(field) for field in fields) for config in configs}) == 1


def models_among(names: Iterable[str], suffix: str, wanted: str | None = None) -> list[list[str]]:
    """The models among a repository's files of a suffix, each as its files, in order; other files than targets not.

    Args:
        names: Paths, with ``/``.
        suffix: ``.gguf`` or ``.litertlm``.
        wanted: Only those that this path, name or pattern means.
    """
    files = sorted(name for name in names if name.lower().endswith(suffix) and not is_hidden(name))
    return list(_by_model(_fitting(files, wanted)).values())


def model_of(file: str) -> str:
    """A GGUF file's name without quantization and part number, in lower case.

    >>> model_of("gemma-4-31B-it-BF16-00001-of-00002.gguf"), model_of("gemma-4-E2B-it-UD-Q4_K_XL.gguf")
    ('gemma-4-31b-it', 'gemma-4-e2b-it')
    """
    return without_quantization(file).lower()


def _models_in(folder: Path) -> dict[str, list[str]]:
    """The models in a folder, by their whole names: targets, else drafters, else the first of other files."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file() and not is_hidden(entry.name)]
    models = _by_model(name for name in sorted(names) if name.lower().endswith(_SUFFIX))
    if len(models) < 2:
        return models
    roles = {whole: _role(folder / parts[0]) for whole, parts in models.items()}
    wanted = "target" if "target" in roles.values() else "drafter"
    # Of nothing but other files the first, so that the message says what it is.
    return {whole: parts for whole, parts in models.items() if roles[whole] == wanted} or dict([*models.items()][:1])


def _role(path: Path) -> str:
    """``target``, ``drafter`` or ``other``: by the header; by the name where that cannot be read."""
    try:
        kind, config = summary_of(path)
    except ModelFormatError:
        found = _OTHER_NAME.search(path.name)
        return "target" if found is None else "drafter" if path.name.lower().startswith("mtp-") else "other"
    if kind:
        return "other"
    return "drafter" if is_assistant(config) else "target"


def choose_files(names: Iterable[str], wanted: str | None, model: str) -> list[str]:
    """The file of the model that was asked for; of a split model all parts in order.

    Without a name or pattern it is the only model there, or of several the Q4_K_M one, as llama.cpp itself chooses
    (``common/download.cpp``). Drafters (``mtp-``), projectors (``mmproj``) and importance matrices (``imatrix``) are
    taken only when named, hidden files never.

    Args:
        names: Paths inside the folder or repository, with ``/``.
        wanted: A path, a file name, or a glob pattern. The first of these that fits counts, and letter case only where
            two names differ in nothing else.
        model: What to call the model in the sentence.

    Raises:
        ModelFormatError: None fits, several do, or a part is missing.
    """
    files = sorted(name for name in names if name.lower().endswith(_SUFFIX) and not is_hidden(name))
    models = _by_model(_fitting(files, wanted))
    if not wanted and len(models) > 1:
        usual = [stem for stem in models if _USUAL in stem.lower()]
        models = {stem: models[stem] for stem in usual} or models
    if len(models) != 1:
        listed = ", ".join(list(models or files)[:8]) or "none"
        what = f"no GGUF file {wanted!r}" if wanted else "no GGUF file of a target"
        holds = f"{len(models)} models that fit: {listed}" if models else f"{what}; there are: {listed}"
        raise ModelFormatError(
            f"{model} holds {holds}.",
            "Name the one that is meant: org/name/file.gguf, org/name:Q4_K_M, or the path of a file.",
        )
    (parts,) = models.values()
    if part := _part(parts[0]):
        there = {int(found["number"]) for name in parts if (found := _part(name))}
        if missing := [number for number in _numbers(part) if number not in there]:
            name = f"{parts[0][: part.start()]}-{missing[0]:05}-of-{part['count']}{_SUFFIX}"
            raise _parts_missing(model, int(part["count"]), len(missing), name)
    return parts


def _numbers(part: re.Match[str]) -> range:
    return range(1, int(part["count"]) + 1)


def _parts_missing(model: str, count: int, missing: int, first: str) -> ModelFormatError:
    return ModelFormatError(
        f"{model} is split into {count} files, of which {count - missing} are there: {first} is missing.",
        "Download it again.",
    )


def _by_model(names: Iterable[str]) -> dict[str, list[str]]:
    """Name of a whole model -> its files: the parts of a split model differ in the part's number only."""
    models: dict[str, list[str]] = {}
    for name in names:
        models.setdefault(_whole(name), []).append(name)
    return models


def _part(name: str) -> re.Match[str] | None:
    """Number and count of a part of a split model; None for other names, such as ``-00000-of-00000.gguf``."""
    part = _PART.search(name)
    return part if part is not None and int(part["number"]) in _numbers(part) else None


def _whole(name: str) -> str:
    """The name of the model that a file or part belongs to."""
    part = _part(name)
    return name if part is None else f"{name[: part.start()]}-of-{part['count']}{_SUFFIX}"


def _fitting(files: list[str], wanted: str | None) -> list[str]:
    """The files that fit what was asked for."""
    if wanted is None:
        return [name for name in files if not _OTHER_NAME.search(name.rpartition("/")[2])]
    # One part stands for all. A path before a name, the letters as they are before any: a name is no pattern if a
    # file has it, and no file below another shadows it.
    whole = _whole(wanted)
    for only_name, folded in product((False, True), repeat=2):
        wished = whole.lower() if folded else whole
        found = []
        for name in files:
            fitting = _whole(name.rpartition("/")[2] if only_name else name)
            if (fitting.lower() if folded else fitting) == wished:
                found.append(name)
        if found:
            return found
    pattern = wanted.lower()
    return [name for name in files if _matches(name, pattern)] if any(mark in pattern for mark in "*?[") else []


def _matches(name: str, pattern: str) -> bool:
    full, base = name.lower(), name.rpartition("/")[2].lower()
    # A pattern that starts with the prefix, or names a folder, means such a file.
    named = pattern.lstrip("*").startswith(_NOT_TARGETS) or "/" in pattern
    return (named or not _OTHER_NAME.search(base)) and (
        # With a slash in front, a name that starts with the quantization fits a pattern with a separator before it.
        fnmatchcase(f"/{full}", pattern) or fnmatchcase(full, pattern) or fnmatchcase(base, pattern)
    )
