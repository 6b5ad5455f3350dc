"""Choose and fetch the files of a GGUF model in a folder or repository, split models included."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._hub import hub_errors, repository_files
from polydraft.checkpoints._names import repository
from polydraft.contract.requests import HubOptions
from polydraft.errors import ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft.contract.requests import ModelSource

__all__ = ["choose_files", "fetch_gguf"]

_PART = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
_USUAL = "q4_k_m"
_NOT_TARGETS = ("mtp-", "mmproj")


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
        folder, wanted = (path, source.file) if path.is_dir() else (path.parent, path.name)
        names = [str(file.relative_to(folder).as_posix()) for file in folder.rglob("*.gguf")]
        return folder / choose_files(names, wanted, source.id)[0]
    hub = (hub or HubOptions()).model_copy(update={"revision": source.revision})
    repo = repository(source.id)
    with hub_errors(repo, hub):
        from huggingface_hub import hf_hub_download

        chosen = choose_files(repository_files(repo, hub), source.file, source.id)
        paths = [hf_hub_download(repo, name, **hub.arguments()) for name in chosen]
    return Path(paths[0])


def choose_files(names: Iterable[str], wanted: str | None, model: str) -> list[str]:
    """The file of the model that was asked for; of a split model all parts in order.

    Without a name or pattern it is the only model there, or of several the Q4_K_M one, as llama.cpp itself chooses
    (``common/download.cpp``). Drafters (``mtp-``) and projectors (``mmproj``) are taken only when named.

    Args:
        names: Paths inside the folder or repository, with ``/``.
        wanted: A file name, a path, or a glob pattern; letter case does not matter.
        model: What to call the model in the sentence.

    Raises:
        ModelFormatError: None fits, several do, or a part is missing.
    """
    files = sorted(name for name in names if name.lower().endswith(".gguf"))
    found = [name for name in files if _fits(name, wanted)]
    models: dict[str, list[str]] = {}
    for name in found:
        # The parts of a split model have the same name but for the part's number.
        models.setdefault(_PART.sub(".gguf", name), []).append(name)
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
    if (part := _PART.search(parts[0])) and len(parts) != int(part["count"]):
        raise ModelFormatError(
            f"{model} is split into {int(part['count'])} files, of which {len(parts)} are there.", "Download it again."
        )
    return parts


def _fits(name: str, wanted: str | None) -> bool:
    full, base = name.lower(), name.rpartition("/")[2].lower()
    if wanted is None:
        return not base.startswith(_NOT_TARGETS)
    pattern = wanted.lower()
    if _PART.search(pattern):  # one part stands for all
        return _PART.sub(".gguf", pattern) in {_PART.sub(".gguf", full), _PART.sub(".gguf", base)}
    if any(mark in pattern for mark in "*?["):
        # A pattern that starts with the prefix, or names a folder, means such a file.
        named = pattern.lstrip("*").startswith(_NOT_TARGETS) or "/" in pattern
        return (named or not base.startswith(_NOT_TARGETS)) and (
            # With a slash in front, a name that starts with the quantization fits a pattern with a separator before it.
            fnmatchcase(f"/{full}", pattern) or fnmatchcase(full, pattern) or fnmatchcase(base, pattern)
        )
    return pattern in {full, base}
