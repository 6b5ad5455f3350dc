"""From what the user wrote to a ``ModelSource``: its config is read, its weights are not touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polydraft.checkpoints import safetensors
from polydraft.checkpoints._hub import hub_errors
from polydraft.checkpoints._hub_files import cached_files, repository_files
from polydraft.checkpoints._names import BUILTIN_PREFIX, Name, did_you_mean, parse, shown, sibling_folders
from polydraft.checkpoints.config import read_config
from polydraft.checkpoints.gguf import read_header
from polydraft.checkpoints.gguf_config import config_of
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import InvalidRequestError, ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft.contract.records import LocalModelRecord

__all__ = ["KnownNames", "Role", "resolve"]

Role = Literal["target", "drafter"]

_BUILTIN_HINT = "pip install 'polydraft[builtin]'"


@dataclass(frozen=True)
class KnownNames:
    """What is known besides the disk and the Hub: built-in models, and ids of the registry with their formats."""

    local_models: Mapping[str, LocalModelRecord] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    """Hub id, in lower case -> weight format, for ids that the registry lists."""
    ids: tuple[str, ...] = ()
    """Hub ids to suggest where a name is misspelt."""

    def suggest(self, wrong: str, more: Iterable[str] = ()) -> str:
        """A "Did you mean ...?", or an empty string."""
        return did_you_mean(wrong, [*(f"{BUILTIN_PREFIX}{name}" for name in self.local_models), *self.ids, *more])


def resolve(
    target: str | Path, *, hub: HubOptions | None = None, role: Role = "target", known: KnownNames | None = None
) -> ModelSource:
    """Find a model and read its config.

    Of a Hub model only ``config.json`` is downloaded; its files are listed only where that is needed to tell the
    format.

    Args:
        target: Hub id, folder, single weight file, or ``builtin:<name>``.
        hub: How to reach the Hub.
        role: ``target`` or ``drafter``, for the sentences of errors.
        known: Built-in models and registry ids; default: those of the installed plugins and the registry.

    Raises:
        ModelNotFoundError: It does not exist, may not be read, or cannot be reached.
        ModelFormatError: It exists, but holds no model of a known layout.
        InvalidRequestError: The name is not one.
    """
    if known is None:
        from polydraft._registry import known_names

        known = known_names()
    hub = hub or HubOptions()
    name = parse(target)
    written = str(target).strip()
    if name.kind == "builtin":
        return _builtin(name.value, written, role, known)
    if name.kind == "local":
        try:
            return _local(Path(name.value), written, role, known)
        except OSError as error:  # a name too long for any file, or a folder that may not be read
            raise ModelNotFoundError(
                f"There is no {role} {shown(written)} to read: {error.strerror or type(error).__name__}.",
                "Check the path and its permissions; a Hub id is org/name.",
            ) from error
    return _from_hub(name, written, hub, role, known)


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
    if path.is_file():
        return _single_file(path, written)
    if not path.is_dir():
        hint = known.suggest(written, sibling_folders(path))
        if not hint:
            bare = "/" not in written and "\\" not in written
            hint = "A Hub id is org/name." if bare else "Check the path."
        raise ModelNotFoundError(f"There is no {role} {written!r}: no such folder or file.", hint)
    config = path / "config.json"
    for record in known.local_models.values():
        if path == Path(record.path):
            return ModelSource(
                id=written, kind="local", path=path, format=record.format, config=read_config(config, written)
            )
    if config.is_file():
        data = read_config(config, written)
        form, file = _folder_format(path, data, written, known)
        return ModelSource(id=written, kind="local", path=path, format=form, config=data, file=file)
    for suffix, form in ((".gguf", "gguf"), (".litertlm", "litertlm")):
        if file := _one_file(path, suffix, written):
            data = _gguf_config(path / file, written) if form == "gguf" else {}
            return ModelSource(id=written, kind="local", path=path, format=form, config=data, file=file)
    if (path / "adapter_config.json").is_file():
        raise ModelFormatError(
            f"{written} is an adapter (LoRA), not a whole model: it has no config.json.",
            "Merge it into its base model, save that, and load the result.",
        )
    raise ModelFormatError(
        f"The folder {written} is no model: it has no config.json.",
        "Give the folder that holds config.json and the weights"
        + (f", for example {found[0]}." if (found := _inner_models(path)) else "."),
    )


def _inner_models(path: Path) -> list[str]:
    try:
        return sorted(str(found.parent) for found in path.glob("*/config.json"))
    except OSError:
        return []


def _single_file(path: Path, written: str) -> ModelSource:
    form = {".gguf": "gguf", ".litertlm": "litertlm"}.get(path.suffix.lower())
    if form is None:
        raise ModelFormatError(
            f"{written} is a file of an unknown kind.",
            "Give the folder that holds config.json, or a .gguf or .litertlm file.",
        )
    config = _gguf_config(path, written) if form == "gguf" else {}
    return ModelSource(id=written, kind="local", path=path, format=form, config=config)


def _gguf_config(path: Path, written: str) -> dict[str, Any]:
    """What the file's own header says, in the words of a config."""
    return config_of(read_header(path, written))


def _folder_format(path: Path, config: Mapping[str, Any], written: str, known: KnownNames) -> tuple[str, str | None]:
    """Format of a folder with config.json, and the file inside it where one counts."""
    files = safetensors.weight_files(path)
    if files:
        return ("mlx" if _is_mlx(config) or _saved_by_mlx(files[0]) else "safetensors"), None
    if file := _one_file(path, ".gguf", written):
        return "gguf", file
    if file := _one_file(path, ".litertlm", written):
        return "litertlm", file
    if form := _format_of_kin(config, known):
        return form, None
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelFormatError(
            f"{written} has weights in pickle files only.",
            "Convert them: save_pretrained(folder) writes safetensors.",
        )
    raise ModelFormatError(f"{written} has a config.json but no weights.", "Download or save the model again.")


def _format_of_kin(config: Mapping[str, Any], known: KnownNames) -> str | None:
    """The format of the built-in model of the same type, for engines whose models need no file of weights."""
    for record in known.local_models.values():
        folder = Path(record.path)
        if safetensors.weight_files(folder) or not (folder / "config.json").is_file():
            continue
        if read_config(folder / "config.json", record.name).get("model_type") == config.get("model_type"):
            return record.format
    return None


def _one_file(path: Path, suffix: str, written: str) -> str | None:
    """The one target file of a folder by suffix: drafters (``mtp-``), projectors (``mmproj``), later shards aside."""
    files = sorted(found.name for found in path.iterdir() if found.suffix.lower() == suffix)
    targets = [name for name in files if not name.lower().startswith(("mmproj", "mtp-"))] or files
    first_shards = [name for name in targets if "-of-" not in name or "-00001-of-" in name]
    if len(first_shards) > 1:
        raise ModelFormatError(
            f"{written} holds {len(first_shards)} models: {', '.join(first_shards)}.",
            f"Name one of them: {path / first_shards[0]}.",
        )
    return first_shards[0] if first_shards else None


def _is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether the config is of a checkpoint quantized by MLX: ``quantization`` with bits and group size."""
    quantization = config.get("quantization")
    return isinstance(quantization, Mapping) and "group_size" in quantization


def _saved_by_mlx(file: Path) -> bool:
    metadata = safetensors.header(file).get("__metadata__") or {}
    return isinstance(metadata, Mapping) and metadata.get("format") == "mlx"


def _from_hub(name: Name, written: str, hub: HubOptions, role: Role, known: KnownNames) -> ModelSource:
    repo, file = name.value, name.file
    if name.revision is not None:
        if hub.revision not in {None, name.revision}:
            raise InvalidRequestError(
                f"{written} names the revision {name.revision!r}, and revision={hub.revision!r} was given.",
                "Give it once.",
            )
        hub = hub.model_copy(update={"revision": name.revision})

    def similar() -> str:
        return "" if repo.lower() in known.formats else known.suggest(repo)

    form = known.formats.get(repo.lower()) or _format_by_name(repo, file)
    with hub_errors(repo, hub, role=role, similar=similar):
        if form in {"gguf", "litertlm"}:
            config = _optional_config(repo, hub, written)
        else:
            config, form = _config_and_format(repo, hub, written, form)
    return ModelSource(id=written, kind="hub", format=form, config=config, revision=hub.revision, file=file)


def _format_by_name(repo: str, file: str | None) -> str | None:
    """What the id itself says; a guess from the name of the repository alone is checked against its files."""
    if file:
        return "litertlm" if file.endswith(".litertlm") else "gguf"
    return "mlx" if repo.lower().startswith("mlx-community/") else None


def _download_config(repo: str, hub: HubOptions, written: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        repo,
        "config.json",
        revision=hub.revision,
        cache_dir=hub.cache_dir,
        token=hub.token,
        local_files_only=hub.local_files_only,
    )
    return read_config(Path(path), written)


def _optional_config(repo: str, hub: HubOptions, written: str) -> dict[str, Any]:
    """The config of a repository of single files, which may have none."""
    from huggingface_hub import errors

    try:
        return _download_config(repo, hub, written)
    except errors.LocalEntryNotFoundError:
        if not cached_files(repo, hub):
            raise
        return {}
    except errors.EntryNotFoundError:
        return {}


def _config_and_format(repo: str, hub: HubOptions, written: str, form: str | None) -> tuple[dict[str, Any], str]:
    from huggingface_hub import errors

    try:
        config = _download_config(repo, hub, written)
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError as error:
        found = _format_of_files(repository_files(repo, hub))
        if found is None:
            raise ModelFormatError(
                f"{repo} is no model that can be loaded: it has no config.json.", f"See https://huggingface.co/{repo}."
            ) from error
        return {}, found
    if form is None and "gguf" in repo.lower():
        form = _format_of_files(repository_files(repo, hub))
    return config, form or ("mlx" if _is_mlx(config) else "safetensors")


def _format_of_files(files: Iterable[str]) -> str | None:
    names = [name.lower() for name in files]
    for suffix, form in ((".safetensors", None), (".gguf", "gguf"), (".litertlm", "litertlm")):
        if any(name.endswith(suffix) for name in names):
            return form
    return None
