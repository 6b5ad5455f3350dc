"""Where a drafter may be found: the registry, a folder next to the target, and the checkpoint's own config."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polydraft.checkpoints._hub import hub_errors, repository_files
from polydraft.checkpoints._names import model_folders, repository
from polydraft.checkpoints.compatibility import check_pair
from polydraft.checkpoints.config import drafter_kind, is_assistant
from polydraft.checkpoints.litertlm import DRAFTER_INSIDE
from polydraft.errors import ModelFormatError, ModelNotFoundError, PairMismatchError, PolydraftError

if TYPE_CHECKING:
    from polydraft._registry.pairs import PairRegistry, RegisteredPair
    from polydraft.contract.records import DrafterKind
    from polydraft.contract.requests import HubOptions, ModelSource

__all__ = ["Candidate", "DrafterLookup", "candidates"]

DrafterLookup = Callable[[str | Path], "ModelSource"]
"""Finds a drafter by a name that a user could give, and reads its config."""

_CACHE_FOLDER = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)")
_GGUF_QUANT = re.compile(r"[-_.](?:bf16|f16|f32|i?q\d\w*|mxfp4\w*|ud)(?=$|[-_.])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A drafter that may belong to the target; whether it fits is checked later."""

    name: str
    kind: DrafterKind
    chosen_by: Literal["registry", "sibling", "config"]
    source: Callable[[], ModelSource | None]
    """Resolves it; gives None for drafters that are in the target's file or need no model."""
    entry: RegisteredPair | None = None
    note: str = ""


def candidates(
    target: ModelSource, registry: PairRegistry, resolve: DrafterLookup, hub: HubOptions | None = None
) -> Iterator[Candidate]:
    """Drafters for ``drafter="auto"``, best first. ``hub`` is how to list a repository; None: it is not listed."""
    if target.format == "litertlm" and (inside := target.config.get(DRAFTER_INSIDE)):
        yield Candidate(f"the one inside {target.id}", inside["kind"], "config", lambda: None)
        return
    # A variant is a guess by name: for a Hub id of the same format only. A folder's name is looked up last, below.
    for entry in registry.find(repository(target.id) if target.kind == "hub" else target.id):
        if not entry.variant or (target.kind == "hub" and entry.pair.format == target.format):
            note = f"{target.id} is taken for another packing of {entry.pair.target}." if entry.variant else ""
            yield _registered(entry, "registry", resolve, note)
    if target.kind == "hub" and target.format == "gguf" and hub is not None:
        yield from _gguf_in_repository(target, resolve, hub)
    # What follows looks at folders.
    if target.path is None or target.format == "litertlm":
        return
    if target.kind == "builtin":
        yield from _named(target, [f"{target.id}-assistant", f"{target.id}-draft"], resolve)
        return
    path = Path(os.path.abspath(target.path))  # noqa: PTH100 - resolve() would follow links to other names
    # By name before by config: a name is a claim, while a config may fit by accident.
    yield from _named(target, [path.with_name(f"{path.name}-assistant"), path.with_name(f"{path.name}-draft")], resolve)
    if target.format == "gguf":
        yield from _gguf_beside(path, target.file, resolve)
    else:
        yield from _fitting_sibling(target, path, resolve)
    # Last: a folder's name is the weakest evidence.
    yield from _by_own_name(target, path, registry, resolve)


def _registered(
    entry: RegisteredPair, chosen_by: Literal["registry", "config"], resolve: DrafterLookup, note: str = ""
) -> Candidate:
    pair = entry.pair

    def source() -> ModelSource | None:
        if pair.drafter is None:
            return None
        found = resolve(pair.drafter)
        return found.model_copy(update={"file": pair.drafter_file}) if pair.drafter_file else found

    notes = " ".join(part for part in (note, pair.note) if part)
    return Candidate(pair.drafter or f"the one inside {pair.target}", pair.kind, chosen_by, source, entry, notes)


def _named(
    target: ModelSource, names: list[str | Path] | list[str] | list[Path], resolve: DrafterLookup
) -> Iterator[Candidate]:
    """Drafters that belong to the target by their names."""
    for name in names:
        if isinstance(name, Path) and not name.is_dir():
            continue
        try:
            found = resolve(name)
        except ModelNotFoundError:
            continue
        except ModelFormatError as error:
            yield Candidate(str(name), "mtp", "sibling", _raiser(error))
            continue
        yield Candidate(str(name), drafter_kind(found.config), "sibling", _given(found))


def _given(source: ModelSource) -> Callable[[], ModelSource]:
    return lambda: source


def _raiser(error: PolydraftError) -> Callable[[], ModelSource]:
    def source() -> ModelSource:
        raise error

    return source


def _fitting_sibling(target: ModelSource, path: Path, resolve: DrafterLookup) -> Iterator[Candidate]:
    """The one assistant next to the target whose config fits and that no other target claims; of several, none."""
    fitting: list[ModelSource] = []
    for folder in model_folders(path.parent):
        owner = folder.name.removesuffix("-assistant")
        # ``x-assistant`` next to ``x`` belongs to ``x``, even if its config would fit this target.
        if folder == path or (owner not in {folder.name, path.name} and (folder.parent / owner).is_dir()):
            continue
        try:
            found = resolve(folder)
            if is_assistant(found.config):
                check_pair(target, found, "mtp")
                fitting.append(found)
        except PolydraftError:
            continue  # belongs to another target; skip it
    if len(fitting) == 1:
        found = fitting[0]
        yield Candidate(
            found.id, "mtp", "config", _given(found), note=f"{found.id} was found next to the target; it fits."
        )
    elif fitting:
        names = ", ".join(Path(found.id).name for found in fitting)
        why = f"{len(fitting)} assistants here fit ({names}) and none is named {path.name}-assistant."
        yield Candidate(str(path.parent), "mtp", "config", _raiser(PairMismatchError(why, "Name one as `drafter`.")))


def _gguf_beside(path: Path, file: str | None, resolve: DrafterLookup) -> Iterator[Candidate]:
    """A file ``mtp-<model>*.gguf`` next to a GGUF target, or in a folder ``MTP`` there, as they are published."""
    folder, name = (path, file or "") if path.is_dir() else (path.parent, path.name)
    found = _gguf_drafters(
        other.relative_to(folder).as_posix()
        for place in (folder, folder / "MTP")
        for other in place.glob("*")
        if other.is_file()
    ).get(_model_of(name))
    if name and found:
        best = folder / found[0]
        yield Candidate(str(best), "mtp", "sibling", lambda: resolve(best))


def _gguf_in_repository(target: ModelSource, resolve: DrafterLookup, hub: HubOptions) -> Iterator[Candidate]:
    """The same in a Hub repository, if it holds drafters of one model only."""
    repo, at = repository(target.id), f"@{target.revision}" if target.revision else ""
    hub = hub.model_copy(update={"revision": target.revision})
    try:
        with hub_errors(repo, hub) as reached:
            found = list(_gguf_drafters(repository_files(repo, reached)).values())
    except PolydraftError:
        return  # the target's own files cannot be listed either; the error comes when they are fetched
    if len(found) == 1:
        name = f"{repo}{at}/{found[0][0]}"
        yield Candidate(name, "mtp", "sibling", lambda: resolve(name))


def _gguf_drafters(names: Iterable[str]) -> dict[str, list[str]]:
    """Model -> its drafters' files among paths with ``/``, BF16 first: quantizing so small a model gains nothing."""
    drafters: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (not re.search("bf16", name, re.IGNORECASE), name)):
        folder, _, base = name.rpartition("/")
        if folder in {"", "MTP"} and base.lower().startswith("mtp-") and base.lower().endswith(".gguf"):
            drafters.setdefault(_model_of(base[4:]), []).append(name)
    return drafters


def _model_of(file: str) -> str:
    """A GGUF file's name without quantization and part number."""
    return _GGUF_QUANT.sub("", re.sub(r"-\d{5}-of-\d{5}$", "", Path(file).stem)).lower()


def _by_own_name(
    target: ModelSource, path: Path, registry: PairRegistry, resolve: DrafterLookup
) -> Iterator[Candidate]:
    """Drafters of the model that this is a copy of, by the Hub's cache folder, the config or the folder's name."""
    hints: list[str] = []
    if cached := _CACHE_FOLDER.search(path.as_posix()):
        hints.append(f"{cached['org']}/{cached['name']}")
    if isinstance(origin := target.config.get("_name_or_path"), str) and origin:
        hints.append(origin)
    hints.append(path.name if path.is_dir() else path.stem)
    for hint in dict.fromkeys(hints):
        entries = registry.find(hint, format=target.format)
        for entry in entries:
            note = f"{target.id} is taken for a copy of {entry.pair.target}, by its name."
            yield _registered(entry, "config", resolve, note)
        if entries:
            return
