"""Reaching the Hugging Face Hub: its errors in polydraft's terms, and the files of a repository.

``huggingface_hub`` is imported when a call is made.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._reach import hub_answers, is_unreachable, note_unreachable, without_retry_lines
from polydraft.checkpoints._weight_files import may_be_weights
from polydraft.errors import InvalidRequestError, ModelNotFoundError, PolydraftError
from polydraft.files import system_error
from polydraft.secrets import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polydraft.contract.requests import HubOptions

__all__ = [
    "cached_files",
    "hub_errors",
    "is_temporary",
    "repository_files",
    "repository_format",
    "repository_sizes",
]

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def hub_errors(
    repo: str, hub: HubOptions, *, role: str = "model", similar: Callable[[], str] = str
) -> Iterator[HubOptions]:
    """Turn errors of ``huggingface_hub`` into typed ones that say what to do.

    Gives the options for the requests: where the Hub cannot be reached, those for the local cache alone.
    ``similar`` gives a "Did you mean ...?" (or nothing) where the repository does not exist.

    Raises:
        ModelNotFoundError: It does not exist, may not be read, or cannot be reached.
        InvalidRequestError: The id, the token or the cache folder is not valid.
        SystemResourceError: The cache's disk is full or read-only, file handles have run out, and so on.
    """
    from huggingface_hub import constants, errors

    reached = hub
    try:
        if not hub.local_files_only:
            _check_token(hub)
            if not constants.HF_HUB_OFFLINE and not hub_answers():
                reached = hub.model_copy(update={"local_files_only": True})
        with without_retry_lines():
            yield reached
    except PolydraftError:
        raise
    except Exception as error:
        lost = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        if is_unreachable(lost):
            note_unreachable()
        typed = _typed(error, repo, hub, role, similar)
        if typed is None:
            raise
        raise typed from error


def _check_token(hub: HubOptions) -> None:
    """Refuse a token that a header cannot hold: the HTTP library's own error would show it."""
    from huggingface_hub import get_token

    if hub.token in (None, True) and (found := get_token()):
        Secret(found, "The Hub's token, in HF_TOKEN or stored by `hf auth login`,")


def _typed(
    error: Exception, repo: str, hub: HubOptions, role: str, similar: Callable[[], str]
) -> PolydraftError | None:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    revision = hub.revision or "main"
    # Before RepositoryNotFoundError, its base class.
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFoundError(
            f"The {role} {repo} is gated, and this account has no access to it.",
            f"Accept its licence at {page}, then {_LOGIN}.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"The {role} {repo} has no revision {revision!r}.", f"See the branches and tags at {page}/tree/main."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"There is no {role} {repo} on the Hub, or it is private.",
            similar() or f"Check the spelling; if it is private, {_LOGIN}.",
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return InvalidRequestError(
            "`token=True` was given, but no token is stored.", f"First {_LOGIN}.", argument="token"
        )
    if isinstance(error, errors.HFValidationError):
        return InvalidRequestError(f"{repo!r} is not a Hub id.", "Write it as org/name, or give the path of a folder.")
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, errors.HfHubHTTPError):
        error = cause  # the Hub did answer, but not with the file
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return _offline(repo, hub, role, similar)
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in {401, 403}:
            return ModelNotFoundError(
                f"The Hub refused access to the {role} {repo} (HTTP {status}): its token is not valid here.",
                "Log in with `hf auth login`, with a token that may read it, or set HF_TOKEN to one or unset it.",
            )
        return ModelNotFoundError(
            f"The Hub answered HTTP {status} for the {role} {repo}.",
            "Try again later; a model that has been downloaded before loads with `local_files_only=True`.",
        )
    if refused := system_error(error, f"{repo} cannot be stored in the Hub's cache"):
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EROFS}:
            refused.hint = "Free some space, or set HF_HOME to a folder on another disk that can be written."
        return refused
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return InvalidRequestError(
            f"The cache folder cannot be written: {error}.",
            "Give a folder that you may write to as `cache_dir`, or set HF_HOME to one.",
            argument="cache_dir",
        )
    if is_unreachable(error):
        return _offline(repo, hub, role, similar)
    return None


def is_temporary(error: BaseException | None) -> bool:
    """Whether the Hub answered that it cannot answer now."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and (status == 429 or status >= 500)


def _offline(repo: str, hub: HubOptions, role: str, similar: Callable[[], str]) -> PolydraftError:
    """The model is not (completely) in the cache and the Hub cannot be asked: for one of three causes."""
    from huggingface_hub import constants

    if hub.local_files_only:
        cause, remedy = "`local_files_only=True` was given", "call once without `local_files_only`"
    elif constants.HF_HUB_OFFLINE:
        cause, remedy = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE once"
    else:
        cause, remedy = "the Hub cannot be reached", "check the network (and HTTPS_PROXY, HF_ENDPOINT) and try again"
    where = f"the cache {hub.cache_dir}" if hub.cache_dir else "the local cache"
    at = f" (revision {hub.revision})" if hub.revision else ""
    return ModelNotFoundError(
        f"The {role} {repo}{at} is not completely in {where}, and {cause}.",
        f"To download it, {remedy}; or give the path of a folder that holds it. {similar()}".rstrip(),
    )


def repository_files(repo: str, hub: HubOptions) -> list[str]:
    """Paths of the repository's files, with ``/``. To be called inside ``hub_errors``: errors are the Hub's own."""
    from huggingface_hub import constants, list_repo_files

    if hub.local_files_only or constants.HF_HUB_OFFLINE:
        return _in_cache(repo, hub)
    try:
        return list(list_repo_files(repo, revision=hub.revision, token=hub.arguments()["token"]))
    except Exception as error:
        if is_unreachable(error) and (cached := cached_files(repo, hub)):  # it went away meanwhile
            return cached
        raise


def repository_sizes(repo: str, hub: HubOptions) -> dict[str, int]:
    """Path -> bytes of each file that ``repository_files`` lists; without the network, of those in the cache."""
    from huggingface_hub import constants, list_repo_tree

    if hub.local_files_only or constants.HF_HUB_OFFLINE:
        return _sizes_in_cache(repo, hub)
    try:
        tree = list_repo_tree(repo, recursive=True, revision=hub.revision, token=hub.arguments()["token"])
        return {entry.path: int(entry.size) for entry in tree if hasattr(entry, "size")}
    except Exception as error:
        if is_unreachable(error) and cached_files(repo, hub):
            return _sizes_in_cache(repo, hub)
        raise


def repository_format(repo: str, hub: HubOptions) -> str | None:
    """The format of single-file models that a repository holds; None if it holds safetensors or none of them."""
    names = repository_files(repo, hub)
    # Safetensors first: a checkpoint's repository may also hold a GGUF copy.
    if any(may_be_weights(name) for name in names if "/" not in name):
        return None
    found = {name.lower().rpartition(".")[2] for name in names}
    return next((form for form in ("gguf", "litertlm") if form in found), None)


def cached_files(repo: str, hub: HubOptions) -> list[str]:
    """Paths of the repository's files in the cache; empty if it is not there."""
    from huggingface_hub import errors

    try:
        return _in_cache(repo, hub)
    except errors.LocalEntryNotFoundError:
        return []


def _in_cache(repo: str, hub: HubOptions) -> list[str]:
    return list(_sizes_in_cache(repo, hub))


def _sizes_in_cache(repo: str, hub: HubOptions) -> dict[str, int]:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, revision=hub.revision, cache_dir=hub.cache_dir, local_files_only=True))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
