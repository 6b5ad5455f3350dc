"""Names of models: ``builtin:<name>``, a path, or a Hub id; and suggestions for misspelt ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft.contract.records import LocalModelRecord

__all__ = ["KnownNames", "Name", "Role", "did_you_mean", "is_path", "model_folders", "parse", "repository", "shown"]

Role = Literal["target", "drafter"]

_BUILTIN = "builtin:"
_LONGEST_SHOWN = 200
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"(?:@(?P<revision>refs/pr/\d+|[A-Za-z0-9][\w.-]*))?"
_HUB = re.compile(
    rf"(?P<repo>{_PART}/{_PART}){_REVISION}(?:/(?P<file>[^\s:]+\.(?i:gguf|litertlm))|:(?P<quant>[\w.-]+))?"
)
_URL = re.compile(r"^(?:https?://(?:huggingface\.co|hf\.co)/|hf://)(?P<rest>[^?#]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Name:
    """A parsed name. ``value`` is a built-in's name, a path, or a repository.

    Of a repository ``file`` is a file or pattern inside it, and ``revision`` a branch, tag or commit.
    """

    kind: Literal["builtin", "local", "hub"]
    value: str
    file: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class KnownNames:
    """Names that are known without the disk and the Hub: built-in models, and the registry's ids."""

    local_models: Mapping[str, LocalModelRecord] = field(default_factory=dict)
    formats: Mapping[str, str] = field(default_factory=dict)
    """Hub id -> weight format, for ids that the registry lists."""

    def format_of(self, repo: str) -> str | None:
        """The weight format of a listed id; letter case does not matter."""
        return next((form for name, form in self.formats.items() if name.lower() == repo.lower()), None)

    def suggest(self, wrong: str, more: Iterable[str] = ()) -> str:
        """A "Did you mean ...?", or an empty string."""
        return did_you_mean(wrong, [*(f"{_BUILTIN}{name}" for name in self.local_models), *self.formats, *more])


def parse(target: str | Path) -> Name:
    """Decide whether a name is a built-in's, a path or a Hub id. A path that exists wins over a Hub id.

    ``org/name`` is a Hub id; ``org/name:Q4_K_M`` and ``org/name/file.gguf`` name one file of a GGUF repository, and
    ``org/name@v1`` a revision.

    Raises:
        InvalidRequestError: The name is empty, a URL, or can be neither a path nor a Hub id.
    """
    if isinstance(target, Path):
        return Name("local", str(_expanded(target)))
    name = target.strip()
    if not name:
        raise InvalidRequestError("The model's name is empty.", "Give a Hub id, a folder, or builtin:<name>.")
    if name.startswith(_BUILTIN):
        return Name("builtin", name.removeprefix(_BUILTIN))
    if url := _URL.match(name):
        repo = "/".join(url["rest"].strip("/").split("/")[:2])
        raise InvalidRequestError(f"{name!r} is a URL.", f"Write the Hub id alone: {repo!r}.")
    local = _expanded(Path(name))
    if is_path(name):
        return Name("local", str(local))
    if match := _HUB.fullmatch(name):
        quant = match["quant"]
        # The whole word: F16 is not BF16, and Q2_K not Q2_K_L. A part of a split model says more after it.
        pattern = f"*[!a-zA-Z0-9]{quant}[.-]*gguf" if quant else None
        return Name("hub", match["repo"], pattern or match["file"], match["revision"])
    if "/" not in name:
        # A bare word is nearly always a misspelt folder or built-in name; the Hub's old ids without a namespace have
        # long been aliases.
        return Name("local", str(local))
    raise InvalidRequestError(
        f"{shown(name)} is neither a folder that exists nor a Hub id.",
        "A Hub id is org/name: letters, digits, '-', '_', '.'.",
    )


def is_path(name: str) -> bool:
    """Whether a name is that of a file or folder: by its form, or because it is there."""
    return _looks_like_path(name) or _exists(_expanded(Path(name)))


def shown(name: str) -> str:
    """The name in quotes, cut where it is too long to be one."""
    return repr(name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}...")


def repository(name: str) -> str:
    """The repository of a Hub source's id, without a revision, file or quantization."""
    match = _HUB.fullmatch(name.strip())
    return match["repo"] if match else name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system is not a path
        return False


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~name of an unknown user: a name like any other
        return path


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", ".\\", "..\\")) or name in {".", ".."} or name.endswith("/")


def did_you_mean(wrong: str, known: Iterable[str], *, count: int = 3) -> str:
    """``Did you mean 'a' or 'b'?``, or an empty string; letter case does not matter."""
    by_folded: dict[str, str] = {}
    for name in known:
        by_folded.setdefault(name.casefold(), name)
    if (same := by_folded.get(wrong.casefold())) is not None:
        return f"Did you mean {same!r}?"
    close = difflib.get_close_matches(wrong.casefold(), by_folded, n=count, cutoff=0.6)
    if not close:
        # The part after the organization alone: `gemma-4-E4B-it` should find `google/gemma-4-E4B-it`.
        tail = wrong.casefold().rpartition("/")[2]
        tails: dict[str, str] = {}
        for folded in by_folded:
            tails.setdefault(folded.rpartition("/")[2].rpartition(":")[2], folded)
        close = [tails[name] for name in difflib.get_close_matches(tail, tails, n=count, cutoff=0.7)]
    if not close:
        return ""
    names = [repr(by_folded[name]) for name in close]
    return f"Did you mean {' or '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)}?"


def model_folders(parent: Path) -> list[Path]:
    """The folders in ``parent`` that hold a model; empty if it cannot be read."""
    try:
        return sorted(folder for folder in parent.iterdir() if (folder / "config.json").is_file())
    except OSError:
        return []
