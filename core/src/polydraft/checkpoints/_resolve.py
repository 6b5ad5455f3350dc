"""From what the user wrote to a ``ModelSource``: its config is read, its weights are not touched."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints._hub import cached_files, hub_errors, repository_format
from polydraft.checkpoints._names import model_folders, parse, shown
from polydraft.checkpoints._weight_files import is_hidden, is_misleading
from polydraft.checkpoints.config import is_mlx, read_config
from polydraft.checkpoints.gguf import MAGIC
from polydraft.checkpoints.gguf_config import read_gguf_config
from polydraft.checkpoints.gguf_files import are_one_model, file_of_folder, first_part, targets_in
from polydraft.checkpoints.litertlm import DRAFTER_INSIDE, read_litertlm_config
from polydraft.checkpoints.litertlm import MAGIC as LITERTLM_MAGIC
from polydraft.checkpoints.safetensors import header, is_read, weight_files
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import InvalidRequestError, ModelFormatError, ModelNotFoundError
from polydraft.files import system_errors

if TYPE_CHECKING:
    from polydraft.checkpoints._names import KnownNames, Name, Role

__all__ = ["resolve"]

_progress = logging.getLogger("polydraft.progress")

_BUILTIN_HINT = "`polydraft engines install transformers`, which brings them, or `pip install 'polydraft[builtin]'`"
_SINGLE_FILES = {".gguf": "gguf", ".litertlm": "litertlm"}
"""Suffix -> format, of models that are one file."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def resolve(
    target: str | Path, *, known: KnownNames, hub: HubOptions | None = None, role: Role = "target"
) -> ModelSource:
    """Find a model (Hub id, folder, single weight file, or ``builtin:<name>``) and read its config.

    Of a Hub model only ``config.json`` is downloaded; its files are listed only where they decide the format. ``role``
    is for the sentences of errors.

    Raises:
        ModelNotFoundError: It does not exist, may not be read, or cannot be reached.
        ModelFormatError: It exists, but is not a model of a known layout.
        InvalidRequestError: The name is neither a path nor a Hub id.
    """
    name = parse(target)
    written = str(target).strip()
    if name.kind == "builtin":
        return _builtin(name.value, written, role, known)
    if name.kind == "local":
        return _local(Path(name.value), written, role, known)
    return _from_hub(name, written, hub or HubOptions(), role, known)


def _builtin(name: str, written: str, role: Role, known: KnownNames) -> ModelSource:
    record = known.local_models.get(name)
    if record is None:
        names = ", ".join(sorted(known.local_models))
        raise ModelNotFoundError(
            f"There is no built-in {role} {name!r}.",
            known.suggest(written)
            or (f"There are: {names}." if names else f"Install the built-in pairs: {_BUILTIN_HINT}."),
        )
    folder = Path(record.path)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelFormatError(f"{written} is damaged: {config} is missing.", f"Install it again: {_BUILTIN_HINT}.")
    return ModelSource(
        id=written, kind="builtin", path=folder, format=record.format, config=read_config(config, written)
    )


def _local(path: Path, written: str, role: Role, known: KnownNames) -> ModelSource:
    """The model at a path: a folder, or a single weight file."""
    try:
        with system_errors(f"The {role} {shown(written)} cannot be read"):
            form, file, config = _look(path, written, role, known)
    except OSError as error:  # a name too long for any file, or a folder that may not be read
        raise ModelNotFoundError(
            f"There is no {role} {shown(written)} to read: {error.strerror or type(error).__name__}.",
            "Check the path and its permissions; a Hub id is org/name.",
        ) from error
    return ModelSource(id=written, kind="local", path=path, format=form, config=config, file=file)


def _look(path: Path, written: str, role: Role, known: KnownNames) -> tuple[str, str | None, dict[str, Any]]:
    """Format, file inside the folder, if it is one, and config of what is at the path."""
    if path.is_file():
        return _single_file(path, written)
    if path.is_dir():
        if any(entry.name == "config.json" or entry.suffix.lower() in _SINGLE_FILES for entry in path.iterdir()):
            _check_files(path, written)
        return _folder(path, written, role, known)
    raise _not_found(path, written, role, known)


def _check_files(folder: Path, written: str) -> None:
    """Refuse a folder with files that cannot be read: some engines wait for a FIFO for ever, and leave out the others.

    Raises:
        ModelFormatError: An entry is a FIFO, socket or device; or a folder or a link that leads nowhere in place of a
            file that engines read. Hidden entries do not count.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() or is_hidden(path.name):
            continue
        if path.exists() and (not path.is_dir() or (path.suffix and is_read(path.name))):
            what = "is not a regular file"
        elif path.is_symlink() and not path.exists() and is_read(path.name):
            what = f"is a link to {path.readlink()}, which is not there"
        else:
            continue
        raise ModelFormatError(f"{path.name} of {written} {what}.", "Download or save the model again.")


def _not_found(path: Path, written: str, role: Role, known: KnownNames) -> ModelNotFoundError:
    if path.exists():
        return ModelNotFoundError(f"{shown(written)} is neither a folder nor a regular file.", "Check the path.")
    if path.is_symlink():
        return ModelNotFoundError(
            f"The {role} {shown(written)} is a link to {path.readlink()}, which is not there.", "Make the link again."
        )
    hint = known.suggest(written, map(str, model_folders(path.parent)))
    if not hint:
        bare = "/" not in written and "\\" not in written
        hint = "A Hub id is org/name." if bare else "Check the path."
    return ModelNotFoundError(f"There is no {role} {written!r}: no such folder or file.", hint)


def _single_file(path: Path, written: str) -> tuple[str, None, dict[str, Any]]:
    form = _SINGLE_FILES.get(path.suffix.lower())
    if form is None:
        with path.open("rb") as file:  # Ollama's blobs have no suffix
            start = file.read(len(LITERTLM_MAGIC))
        form = "gguf" if start.startswith(MAGIC) else "litertlm" if start == LITERTLM_MAGIC else None
    if form is None:
        raise ModelFormatError(
            f"{written} is a file of an unknown kind.",
            "Give the folder that holds config.json, or a .gguf or .litertlm file.",
        )
    if form == "gguf":
        return form, None, read_gguf_config(first_part(path, written), written)
    return form, None, read_litertlm_config(path, written)


def _folder(path: Path, written: str, role: Role, known: KnownNames) -> tuple[str, str | None, dict[str, Any]]:
    """Format of a folder, the file inside it where it holds single files, and its config."""
    file = path / "config.json"
    for record in known.local_models.values():
        if path == Path(record.path):
            return record.format, None, read_config(file, written)
    if file.is_file():
        config = read_config(file, written)
        form, single = _format(path, config, written, role, known)
        if form == "litertlm" and single is not None:
            config.pop(DRAFTER_INSIDE, None)  # which the file itself says
            config |= read_litertlm_config(path / single, written)
        return form, single, config
    if found := _file_inside(path, written, role):
        file = path / (found[1] or targets_in(path)[0])
        return *found, (read_gguf_config if found[0] == "gguf" else read_litertlm_config)(file, str(file))
    if (path / "adapter_config.json").is_file():
        raise ModelFormatError(
            f"{written} is an adapter (LoRA), not a whole model: it has no config.json.",
            "Merge it into its base model, save that, and load the result.",
        )
    inner = sorted(str(config.parent) for config in path.glob("*/config.json"))
    raise ModelFormatError(
        f"The folder {written} is not a model: it has no config.json.",
        "Give the folder that holds config.json and the weights" + (f", for example {inner[0]}." if inner else "."),
    )


def _format(
    path: Path, config: Mapping[str, Any], written: str, role: Role, known: KnownNames
) -> tuple[str, str | None]:
    """Format of a folder that has a config.json, and the file inside it where it holds single files."""
    # Before single files: a checkpoint's folder may also hold a GGUF copy.
    if files := weight_files(path):
        metadata = header(files[0]).get("__metadata__") or {}
        # MLX writes its name into the file, also for models that it did not quantize.
        saved_by_mlx = isinstance(metadata, Mapping) and metadata.get("format") == "mlx"
        return ("mlx" if saved_by_mlx or is_mlx(config) else "safetensors"), None
    if found := _file_inside(path, written, role):
        return found
    if form := _format_of_kin(config, known):
        return form, None
    names = sorted(entry.name for entry in path.iterdir() if not is_hidden(entry.name))
    if any(name.endswith(_PICKLES) for name in names):
        raise ModelFormatError(
            f"{written} has weights in pickle files only.", "Convert them: save_pretrained(folder) writes safetensors."
        )
    others = [name for name in names if is_misleading(name)]
    but = f": {', '.join(others[:3])} {'is' if len(others) == 1 else 'are'} none of a whole model" if others else ""
    raise ModelFormatError(f"{written} has a config.json but no weights{but}.", "Download or save the model again.")


def _format_of_kin(config: Mapping[str, Any], known: KnownNames) -> str | None:
    """The format of the built-in model of the same type, for engines whose models need no file of weights."""
    for record in known.local_models.values():
        folder = Path(record.path)
        if weight_files(folder) or not (folder / "config.json").is_file():
            continue
        if read_config(folder / "config.json", record.name).get("model_type") == config.get("model_type"):
            return record.format
    return None


def _file_inside(path: Path, written: str, role: Role) -> tuple[str, str | None] | None:
    """Format and name of the one single-file model in a folder; no name for several quantizations of one target."""
    if role == "target" and len(packings := targets_in(path)) > 1 and are_one_model(packings):
        return "gguf", None
    if name := file_of_folder(path, written):
        return "gguf", name
    for suffix, form in _SINGLE_FILES.items():
        files = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.suffix.lower() == suffix and entry.is_file() and not is_hidden(entry.name)
        )
        if len(files) > 1:
            raise ModelFormatError(
                f"{written} holds {len(files)} models: {', '.join(files)}.", f"Name one of them: {path / files[0]}."
            )
        if files:
            return form, files[0]
    return None


def _from_hub(name: Name, written: str, hub: HubOptions, role: Role, known: KnownNames) -> ModelSource:
    """A model on the Hub, at one revision, from its config alone."""
    repo, file = name.value, name.file
    if name.revision is not None:
        if hub.revision not in {None, name.revision}:
            raise InvalidRequestError(
                f"{written} names the revision {name.revision!r}, and `revision={hub.revision!r}` was given.",
                "Give it once.",
                argument="revision",
            )
        hub = hub.model_copy(update={"revision": name.revision})
    form = known.format_of(repo)
    similar = partial(known.suggest, repo) if repo not in known.formats else str
    _progress.info("Asking the Hub for %s", repo)
    with hub_errors(repo, hub, role=role, similar=similar) as reached:
        config, form = _config_and_format(repo, reached, written, form or _format_by_name(repo, file))
    return ModelSource(id=written, kind="hub", format=form, config=config, revision=hub.revision, file=file)


def _format_by_name(repo: str, file: str | None) -> str | None:
    """The format that the id itself shows, if any."""
    if file:
        return "litertlm" if file.lower().endswith(".litertlm") else "gguf"
    return "mlx" if repo.lower().startswith("mlx-community/") else None


def _config_and_format(repo: str, hub: HubOptions, written: str, form: str | None) -> tuple[dict[str, Any], str]:
    """Download the config, and list the repository's files where neither name nor config shows the format."""
    from huggingface_hub import errors, hf_hub_download

    single_file = form if form in {"gguf", "litertlm"} else None  # such repositories need not have a config.json
    try:
        config = read_config(Path(hf_hub_download(repo, "config.json", **hub.arguments())), written)
    # Before EntryNotFoundError, its base class: here it is not known whether the file exists.
    except errors.LocalEntryNotFoundError:
        if single_file is None or not cached_files(repo, hub):
            raise
        return {}, single_file
    except errors.EntryNotFoundError as error:
        found = single_file or repository_format(repo, hub)
        if found is None:
            raise ModelFormatError(
                f"{repo} is not a model that can be loaded: it has no config.json.",
                f"See https://huggingface.co/{repo}.",
            ) from error
        return {}, found
    # Only for such names: listing the files is one more request.
    if form is None and "gguf" in repo.lower():
        form = repository_format(repo, hub)
    return config, form or ("mlx" if is_mlx(config) else "safetensors")
