"""Which files a Hub repository holds; where the Hub cannot be asked, which of them are in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._hub import is_unreachable

if TYPE_CHECKING:
    from polydraft.contract.requests import HubOptions

__all__ = ["cached_files", "repository_files"]


def repository_files(repo: str, hub: HubOptions) -> list[str]:
    """Paths of the repository's files, with ``/``. To be called inside ``hub_errors``: errors are the Hub's own."""
    from huggingface_hub import constants, list_repo_files

    if hub.local_files_only or constants.HF_HUB_OFFLINE:
        return _in_cache(repo, hub)
    try:
        return list(list_repo_files(repo, revision=hub.revision, token=hub.token))
    except Exception as error:
        if is_unreachable(error) and (cached := cached_files(repo, hub)):
            return cached
        raise


def cached_files(repo: str, hub: HubOptions) -> list[str]:
    """Paths of the repository's files in the cache; empty if it is not there."""
    from huggingface_hub import errors

    try:
        return _in_cache(repo, hub)
    except errors.LocalEntryNotFoundError:
        return []


def _in_cache(repo: str, hub: HubOptions) -> list[str]:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, revision=hub.revision, cache_dir=hub.cache_dir, local_files_only=True))
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
