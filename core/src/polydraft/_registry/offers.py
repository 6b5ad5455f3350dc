"""Which packings of a target exist: in the registry, in its repository, in its folder and next to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.checkpoints._hub import hub_errors, is_temporary, repository_sizes
from polydraft.checkpoints._names import repository
from polydraft.checkpoints._quantization import (
    bits,
    dtype_name,
    is_quantized,
    name_in_config,
    name_in_file,
    name_of_gguf,
    normal,
    stored_bits,
)
from polydraft.checkpoints._weight_files import may_be_weights
from polydraft.checkpoints.config import checkpoint_dtype, names_dtype, text_config
from polydraft.checkpoints.gguf_config import summary_of
from polydraft.checkpoints.gguf_files import choose_files, model_of, models_among, parts_of, targets_in
from polydraft.checkpoints.litertlm_files import choose_file
from polydraft.checkpoints.safetensors import weight_files
from polydraft.errors import ModelNotFoundError, PolydraftError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from polydraft._registry.packings import PackingRegistry
    from polydraft.contract.packings import PackingRecord
    from polydraft.contract.requests import HubOptions, ModelSource

__all__ = ["UNSTATED", "Offer", "Offers"]

UNSTATED = "unstated"
"""The name of a packing whose quantization nothing tells."""
_SINGLE_FILES = ("gguf", "litertlm")


@dataclass(eq=False)
class Offer:
    """A packing that exists, or that the registry says exists."""

    name: str
    source: str
    """As ``load`` takes it."""
    format: str
    resolve: Callable[[], ModelSource]
    measure: Callable[[], int | None]
    """Its size in bytes; None: not known. Raises ``PolydraftError`` where it turns out not to be there."""
    is_local: bool
    dtype: str = ""
    """The dtype of unquantized weights, such as ``bf16``; empty: not known, or quantized."""
    full_bits: int = 16
    """More bits than these are no gain: the target's own weights have no more."""
    place: int = 0
    """Of two of equal quantization the first is taken."""
    converted: bool = False
    """Whether a backend makes it of ``source`` on this machine."""
    makes: str = ""
    """The quantization that is made of unquantized weights, as ``dtype`` takes it: ``q8_0``; empty: none."""
    problem: str = ""
    """Why it cannot be taken, one sentence, where that is known already."""
    failure: PolydraftError | None = None
    """The error behind ``problem`` where another try may succeed: the Hub could not answer."""

    @cached_property
    def bytes(self) -> int | None:
        """Its size; None: not known. ``problem`` is set where it is not there."""
        try:
            return self.measure()
        except PolydraftError as error:
            self.fail(error)
            return None

    def fail(self, error: PolydraftError) -> None:
        """Note that it cannot be taken."""
        self.problem = self.problem or error.message
        self.failure = error if is_temporary(error.__cause__) else None

    @property
    def quantized(self) -> bool:
        """Whether its weights are quantized."""
        return is_quantized(self.name)

    @property
    def level(self) -> int:
        """Bits of most weights, as far as they count: the more, the less quantized."""
        if self.problem and self.name == UNSTATED:  # could be any: first, so that it is told
            return self.full_bits
        return min(bits(self.dtype or self.name), self.full_bits)

    def is_called(self, quantization: str) -> bool:
        """Whether it is meant by a name: its own, its dtype's, and ``none`` for all that are not quantized."""
        asked = normal(quantization)
        return asked in {normal(self.name), self.dtype} or (asked == "none" and not self.quantized)


class Offers:
    """Finds packings. Repositories are listed once each; where the Hub cannot be reached, in the cache only.

    Args:
        packings: The registry.
        hub: How to reach the Hub. Its revision is not used: it belongs to one repository.
        resolve: Finds a target by name, and reads its config.
    """

    def __init__(
        self, packings: PackingRegistry, hub: HubOptions, resolve: Callable[[str | Path], ModelSource]
    ) -> None:
        self._packings = packings
        self._hub = hub.model_copy(update={"revision": None})
        self._resolve = resolve
        self._listings: dict[tuple[str, str | None], dict[str, int] | PolydraftError] = {}

    def formats(self, source: ModelSource) -> set[str]:
        """Weight formats in which a target may exist, as far as they are known without the Hub."""
        published = self._published(source)
        beside = {"gguf"} if source.format == "safetensors" and source.kind == "local" else set()
        return {source.format, *(entry.format for entry in published), *beside}

    def of(self, source: ModelSource, formats: Container[str] | None = None) -> list[Offer]:
        """The packings of a target, those of other formats than ``formats`` left out; itself is always among them."""
        found = list(self._on_hub(source, formats) if source.kind == "hub" else self._on_disk(source, formats))
        for place, offer in enumerate(found):
            offer.place = place
        return found

    def size(self, source: ModelSource) -> int | None:
        """Bytes of a model's weights; None: not known."""
        try:
            return self._measure(source)
        except PolydraftError:
            return None

    def is_packing(self, source: ModelSource) -> bool:
        """Whether one packing was named: a file, a repository of packings, or anything that is no Hub target."""
        if source.kind != "hub":
            return True
        return source.format != "safetensors" or self._packings.base_of(repository(source.id)) is not None

    def base_of(self, source: ModelSource) -> str | None:
        """The registry's target of which a Hub source is a packing."""
        return self._packings.base_of(repository(source.id)) if source.kind == "hub" else None

    # --- on the Hub ---------------------------------------------------------------------------------------------------
    def _published(self, source: ModelSource) -> list[PackingRecord]:
        # A revision is that of one repository: what other ones hold is not it.
        return self._packings.find(repository(source.id)) if source.kind == "hub" and not source.revision else []

    def _on_hub(self, source: ModelSource, formats: Container[str] | None) -> Iterator[Offer]:
        repo = repository(source.id)
        if source.format in _SINGLE_FILES and source.file is None:
            offers = list(self._files_of(repo, source.format, source.revision))
            one_model = len({model_of(offer.source) for offer in offers}) == 1 and not offers[0].problem
            # Else what is there is asked for when it is loaded, with an error of its own.
            yield from offers if one_model else [self._itself(source)]
            return
        yield self._itself(source)
        if source.format in _SINGLE_FILES:
            return
        for entry in self._published(source):
            if formats is not None and entry.format not in formats:
                continue
            if entry.format in _SINGLE_FILES:
                yield from self._files(entry)
            else:
                yield self._repository(entry)
        if (formats is None or "gguf" in formats) and self._holds_gguf(source):
            yield from self._files_of(repo, "gguf", source.revision)

    def _itself(self, source: ModelSource) -> Offer:
        name = self._name(source)
        unquantized = not is_quantized(name) and source.format not in _SINGLE_FILES
        local = source.kind != "hub"
        return Offer(
            name,
            source.id,
            source.format,
            lambda: source,
            # That it cannot be listed does not mean that it cannot be loaded.
            lambda: self.size(source),
            local,
            dtype=dtype_name(checkpoint_dtype(source.config))
            if unquantized and (local or names_dtype(source.config))
            else "",
            full_bits=stored_bits(source.config) if local else 16,
        )

    def _name(self, source: ModelSource) -> str:
        if source.format == "gguf" and source.kind != "hub" and source.path is not None:
            path = source.path / source.file if source.file else source.path
            return name_of_gguf(path, source.config) or UNSTATED
        listed = self._packings.quantization_of(repository(source.id)) if source.kind == "hub" else ""
        if source.format in _SINGLE_FILES:
            # ``org/name:Q4_K_M`` or ``org/name/file-Q4_K_M.gguf``.
            quant = source.id.rpartition(":")[2].lower() if ":" in source.id and source.kind == "hub" else ""
            return quant or name_in_file(source.file or source.id) or listed or UNSTATED
        told = name_in_config(source.config)
        return told if is_quantized(told) else listed or told

    def _repository(self, entry: PackingRecord) -> Offer:
        def measure() -> int:
            if entry.bytes is not None:
                return entry.bytes
            found = _weights(self.listing(entry.repo))
            if found is None:
                here = " here" if self._hub.local_files_only else ""
                raise ModelNotFoundError(f"{entry.repo} holds no weights{here}.", "Look at the repository's files.")
            return found

        return Offer(
            entry.quantization or UNSTATED,
            entry.repo,
            entry.format,
            lambda: self._resolve(entry.repo),
            measure,
            is_local=False,
            dtype=normal(entry.quantization) if not is_quantized(entry.quantization or UNSTATED) else "",
        )

    def _files(self, entry: PackingRecord) -> Iterator[Offer]:
        """The files of a repository of single-file models, each a packing."""
        for offer in self._files_of(entry.repo, entry.format, None, entry.file):
            name = entry.quantization or offer.name
            if offer.name not in {UNSTATED, name} or (entry.retrained and not is_quantized(name)):
                continue
            offer.name = name
            if entry.bytes is not None:
                offer.measure = lambda: entry.bytes
            yield offer

    def _files_of(self, repo: str, form: str, revision: str | None, wanted: str | None = None) -> Iterator[Offer]:
        """A packing for each model among a repository's files; one with a problem where they cannot be listed."""
        at = f"{repo}@{revision}" if revision else repo
        try:
            listing = self.listing(repo, revision)
        except PolydraftError as error:
            name = self._packings.quantization_of(repo) or UNSTATED
            offer = Offer(name, at, form, lambda: self._resolve(at), lambda: None, is_local=False)
            offer.fail(error)
            yield offer
            return
        for parts in models_among(listing, f".{form}", wanted):
            name = f"{at}/{parts[0]}"
            yield Offer(
                name_in_file(parts[0]) or UNSTATED,
                name,
                form,
                partial(self._resolve, name),
                partial(_total, listing, parts),
                is_local=False,
            )

    def _holds_gguf(self, source: ModelSource) -> bool:
        try:
            listing = self.listing(repository(source.id), source.revision)
        except PolydraftError:
            return False
        return any(name.lower().endswith(".gguf") for name in listing)

    def listing(self, repo: str, revision: str | None = None) -> dict[str, int]:
        """Path -> bytes of a repository's files.

        Raises:
            PolydraftError: It cannot be listed.
        """
        key = (repo, revision)
        if key not in self._listings:
            hub = self._hub.model_copy(update={"revision": revision})
            try:
                with hub_errors(repo, hub) as reached:
                    self._listings[key] = repository_sizes(repo, reached)
            except PolydraftError as error:
                self._listings[key] = error
        found = self._listings[key]
        if isinstance(found, PolydraftError):
            raise found
        return found

    # --- on this machine ----------------------------------------------------------------------------------------------
    def _on_disk(self, source: ModelSource, formats: Container[str] | None) -> Iterator[Offer]:
        path = source.path
        if path is None:  # a server's
            yield self._itself(source)
            return
        if source.format == "gguf" and path.is_dir() and source.file is None:
            yield from (self._file(file, source.id, 32) for file in targets_in(path))
            return
        yield self._itself(source)
        if source.format != "safetensors" or source.kind != "local" or not path.is_dir():
            return
        if formats is None or "gguf" in formats:
            for file in [*targets_in(path), *_beside(path)]:
                if _is_same_model(file, source):
                    yield self._file(file, "", stored_bits(source.config))

    def _file(self, file: Path, folder: str, full_bits: int) -> Offer:
        name = str(Path(folder) / file.name) if folder else str(file)
        return Offer(
            name_of_gguf(file, summary_of(file)[1]) or UNSTATED,
            name,
            "gguf",
            lambda: self._resolve(Path(name)),
            lambda: sum(part.stat().st_size for part in parts_of(file)),
            is_local=True,
            full_bits=full_bits,
        )

    def _measure(self, source: ModelSource) -> int | None:
        """Bytes of a model's weights; None: not known."""
        if source.kind == "hub":
            listing = self.listing(repository(source.id), source.revision)
            if source.format == "gguf":
                return sum(listing[name] for name in choose_files(listing, source.file, source.id))
            if source.format == "litertlm":
                return listing[choose_file(listing, source.file, repository(source.id))]
            return _weights(listing)
        path = source.path
        if path is None:
            return None
        if source.file:
            path = path / source.file
        files = parts_of(path) if path.is_file() else weight_files(path)
        return sum(file.stat().st_size for file in files) or None


def _total(listing: dict[str, int], files: Iterable[str]) -> int:
    """Bytes of some of a repository's files."""
    return sum(listing[name] for name in files)


def _weights(listing: dict[str, int]) -> int | None:
    """Bytes of a checkpoint's safetensors; None where there are none (in the cache, before they are downloaded)."""
    return sum(size for name, size in listing.items() if "/" not in name and may_be_weights(name)) or None


def _beside(folder: Path) -> list[Path]:
    """GGUF files next to a folder that have its name, of split models the first parts."""
    try:
        names = [entry.name for entry in folder.parent.iterdir() if entry.is_file()]
    except OSError:
        return []
    # By name first: headers of large vocabularies take a while to read.
    own = [parts[0] for parts in models_among(names, ".gguf") if model_of(parts[0]) == folder.name.lower()]
    return [folder.parent / name for name in own]


def _is_same_model(file: Path, source: ModelSource) -> bool:
    """Whether a GGUF file's sizes are those of a checkpoint: its name alone says little."""
    try:
        config = summary_of(file)[1]
    except PolydraftError:
        return False
    own = text_config(source.config)
    fields = ("hidden_size", "num_hidden_layers")
    return all(
        config.get(field) == own.get(field) for field in fields if None not in (config.get(field), own.get(field))
    )
