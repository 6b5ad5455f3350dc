"""Choose and fetch the file of a LiteRT-LM model in a folder or repository."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._hub import hub_errors, repository_files
from polydraft.checkpoints._names import repository
from polydraft.checkpoints._weight_files import is_hidden
from polydraft.contract.requests import HubOptions
from polydraft.errors import ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from polydraft.contract.requests import ModelSource

__all__ = ["choose_file", "fetch_litertlm"]

_SUFFIX = ".litertlm"
_REPOSITORY_SUFFIXES = ("-litert-lm", "-litertlm", "-litert")


def fetch_litertlm(source: ModelSource, hub: HubOptions | None = None) -> Path:
    """Make a model present, and return its file.

    Args:
        source: The resolved model: a file, a folder, or a Hub repository with a file name or pattern.
        hub: How to reach the Hub.

    Raises:
        ModelNotFoundError: Offline, gated, or not there (any more).
        ModelFormatError: No file fits what was asked for, or several do.
    """
    if source.kind != "hub":
        path = source.path
        if path is None or not path.exists():
            raise ModelNotFoundError(f"{source.id} is no longer at {path}.", "Check the path.")
        if not path.is_dir():
            return path
        return path / choose_file([entry.name for entry in path.iterdir() if entry.is_file()], source.file, source.id)
    hub = (hub or HubOptions()).model_copy(update={"revision": source.revision})
    repo = repository(source.id)
    with hub_errors(repo, hub):
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(repo, choose_file(repository_files(repo, hub), source.file, repo), **hub.arguments())
        )


def choose_file(names: Iterable[str], wanted: str | None, model: str) -> str:
    """The file that was asked for; without a name or pattern the only one, or the one that the repository is named for.

    Repositories hold a model for every processor, and others for one kind of phone, whose names say so:
    ``gemma-4-E2B-it.litertlm`` and ``gemma-4-E2B-it_qualcomm_sm8750.litertlm``.

    Args:
        names: Paths inside the folder or repository, with ``/``.
        wanted: A path, a file name, or a glob pattern.
        model: The model's name: a folder, or a repository.

    Raises:
        ModelFormatError: None fits, or several do.
    """
    files = sorted(name for name in names if name.lower().endswith(_SUFFIX) and not is_hidden(name))
    found = files
    if wanted:
        exact = [name for name in files if wanted in {name, name.rpartition("/")[2]}]
        found = exact or [name for name in files if fnmatchcase(name.lower(), wanted.lower())]
    elif len(files) > 1:
        base = model.rstrip("/").rpartition("/")[2].lower()
        for suffix in _REPOSITORY_SUFFIXES:
            base = base.removesuffix(suffix)
        found = [name for name in files if name.rpartition("/")[2].lower() == base + _SUFFIX] or files
    if len(found) == 1:
        return found[0]
    listed = ", ".join((found or files)[:8]) or "none"
    what = f"no LiteRT-LM file {wanted!r}" if wanted else "no LiteRT-LM file"
    raise ModelFormatError(
        f"{model} holds {f'{len(found)} models that fit: {listed}' if found else f'{what}; there are: {listed}'}.",
        f"Name the one that is meant: org/name/file{_SUFFIX}, or the path of a file.",
    )
