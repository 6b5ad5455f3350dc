"""A model on the Hugging Face Hub: its format and config, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints._hub import cached_files, hub_errors, repository_format
from polydraft.checkpoints.config import is_mlx, read_config
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import InvalidRequestError, ModelFormatError

if TYPE_CHECKING:
    from polydraft.checkpoints._names import KnownNames, Name, Role

__all__ = ["from_hub"]


def from_hub(name: Name, written: str, hub: HubOptions, role: Role, known: KnownNames) -> ModelSource:
    """Read the config of a Hub model.

    Args:
        name: Its parsed name.
        written: The name as the user wrote it.
        hub: How to reach the Hub.
        role: ``target`` or ``drafter``, for the sentences of errors.
        known: The registry's ids and formats.

    Raises:
        ModelNotFoundError: It does not exist, may not be read, or cannot be reached.
        ModelFormatError: It exists, but is not a model of a known layout.
        InvalidRequestError: Two revisions are given.
    """
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
    with hub_errors(repo, hub, role=role, similar=lambda: "" if form else known.suggest(repo)):
        config, form = _config_and_format(repo, hub, written, form or _format_by_name(repo, file))
    return ModelSource(id=written, kind="hub", format=form, config=config, revision=hub.revision, file=file)


def _format_by_name(repo: str, file: str | None) -> str | None:
    """The format that the id itself shows, if any."""
    if file:
        return "litertlm" if file.endswith(".litertlm") else "gguf"
    return "mlx" if repo.lower().startswith("mlx-community/") else None


def _config_and_format(repo: str, hub: HubOptions, written: str, form: str | None) -> tuple[dict[str, Any], str]:
    """Download the config, and list the repository's files where neither name nor config shows the format."""
    from huggingface_hub import errors, hf_hub_download

    single_file = form if form in {"gguf", "litertlm"} else None  # such repositories need not have a config.json
    try:
        config = read_config(Path(hf_hub_download(repo, "config.json", **hub.model_dump())), written)
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
    if form is None and "gguf" in repo.lower():
        form = repository_format(repo, hub)
    return config, form or ("mlx" if is_mlx(config) else "safetensors")
