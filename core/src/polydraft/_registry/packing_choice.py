"""Which packing of a target a backend loads: the one that was named, or the least quantized that fits into memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, NoReturn

from polydraft import hardware
from polydraft._numbers import as_size, shown
from polydraft._registry.backends import format_hint
from polydraft._registry.offers import UNSTATED, Offer, Offers
from polydraft.checkpoints._kv_bytes import kv_bytes
from polydraft.checkpoints._names import did_you_mean
from polydraft.checkpoints._quantization import bits, dtype_name, is_quantized, normal, stored_bits
from polydraft.checkpoints.config import checkpoint_dtype, names_dtype, text_config
from polydraft.contract.packings import Packing, RejectedPacking
from polydraft.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    PolydraftError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from polydraft.contract.records import BackendRecord, Diagnosis
    from polydraft.contract.requests import ModelSource

__all__ = ["Memory", "PackingChoice", "PackingNotFoundError", "memory_of"]

_MARGIN = 1.1
"""Weights are counted this often: buffers, activations and the engine itself come on top of them."""
_USUAL_CONTEXT = 4096
"""Tokens to leave room for if the caller does not give a context: engines shorten the model's own to what fits."""
_HERE = "this machine"
_USUAL_FILE = "q4_k_m"
"""What the id of a GGUF repository alone means, as in llama.cpp (``common/download.cpp``)."""


class PackingNotFoundError(ModelNotFoundError):
    """A packing that a backend needs cannot be reached now; another backend may need another one."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that weights and context must fit into."""

    free: int | None
    """Bytes; None: not known, so anything fits."""
    place: str = _HERE


def memory_of(diagnosis: Diagnosis | None, device: str) -> Memory:
    """The free memory of the device that a backend would run on: of ``auto`` its accelerators, if it sees any.

    Without an index all of one kind count together: which of them an engine uses is its own business, and a model that
    it could have spread over them must not be refused here.
    """
    kind, _, index = device.partition(":")
    found = [one for one in (diagnosis.devices if diagnosis else ()) if one.name.partition(":")[0] != "cpu"]
    if device != "auto":
        found = [one for one in found if one.name.partition(":")[0] == kind]
    used = [one for one in found if not index or (one.name.partition(":")[2] or "0") == index]
    if not used:
        return Memory(hardware.free_memory())
    used = [one for one in used if one.name.partition(":")[0] == used[0].name.partition(":")[0]]
    free = [one.free_memory_bytes for one in used]
    return Memory(None if None in free else sum(filter(None, free)), " and ".join(one.name for one in used))


@dataclass
class PackingChoice:
    """The packings of one target for one backend, best first: iterate, and reject what turns out not to do.

    Of packings that are not quantized, an engine's own format comes before safetensors, which it converts or reads too;
    then fewer bits, and of equal bits fewer bytes.
    """

    target: ModelSource
    offers: Offers
    backend: BackendRecord
    memory: Memory
    others: Collection[BackendRecord] = ()
    """The installed backends, for what they can do and this one cannot."""
    quantization: str = "auto"
    """As ``load`` takes it."""
    context_length: int | None = None
    dtype: str = "auto"
    kept_bytes: int = 0
    """Memory that the caller gives to the KV of earlier calls; what is kept by default gives way."""
    rejected: list[RejectedPacking] = field(default_factory=list)
    """Those that came before the one that is being looked at."""
    _errors: list[PolydraftError] = field(default_factory=list)
    _smallest: tuple[int, Offer] | None = None
    """Of those that memory refused, the one that needs the fewest bytes, with these."""

    @cached_property
    def usable(self) -> list[Offer]:
        """The packings that this backend can load, converted ones included, as they were found."""
        found = [made for offer in self.offers.of(self.target, self.backend.formats) for made in self._made_of(offer)]
        return [offer for offer in found if offer.format in self.backend.formats]

    @cached_property
    def checks_memory(self) -> bool:
        """Whether a packing must fit: not where exactly one was named, whose size is the engine's business."""
        if self.target.kind == "hub" and not (self.quantization == "auto" and self.offers.is_packing(self.target)):
            return True
        return len(self._asked_for(self.usable) if self.quantization == "auto" else self.usable) > 1

    def __iter__(self) -> Iterator[Offer]:
        """The packings to try, best first; those that cannot be taken or do not fit are rejected on the way."""
        failure: PolydraftError | None = None
        ranked = sorted(self._asked_for(self.usable), key=_level, reverse=True)
        # Sizes of repositories are looked up where they matter: of one level at a time.
        for _, equals in groupby(ranked, key=_level):
            for offer in sorted(equals, key=self._within_level):
                why = offer.problem or self.too_large(offer) or offer.problem  # found while its size was looked up
                if why:
                    self.reject(offer, why)
                    failure = failure or offer.failure
                elif failure is not None and offer.quantized and self.quantization == "auto":
                    # What could not be asked may be the full weights.
                    raise PackingNotFoundError(failure.message, failure.hint) from failure
                else:
                    yield offer

    def reject(self, offer: Offer, why: str, error: PolydraftError | None = None) -> None:
        """Go on without a packing."""
        name = offer.name
        self.rejected.append(RejectedPacking(name=name, source=offer.source, bytes=offer.bytes, why=why))
        if error is not None:
            self._errors.append(error)

    def too_large(self, offer: Offer, drafter: ModelSource | None = None) -> str:
        """Why a packing does not fit into the memory, one sentence; empty if it does, or that is not known."""
        free = self.memory.free
        needed = self.needed(offer, drafter) if free is not None and self.checks_memory else None
        if needed is None or free is None or needed <= free:
            return ""
        if self._smallest is None or needed < self._smallest[0]:
            self._smallest = (needed, offer)
        return f"it {self.needs(needed)}."

    def needed(self, offer: Offer, drafter: ModelSource | None = None) -> int | None:
        """Bytes that a packing needs with its drafter and the context; None if its size is not known."""
        weights = self.size(offer)
        if weights is None:
            return None
        config, length = self.target.config, self.context()
        number_bytes = 4 if (self._dtype_bits() or stored_bits(config)) > 16 else 2
        context = kv_bytes(config, length, number_bytes) or 0
        if drafter is not None:
            weights += self.offers.size(drafter) or 0
        return int(_MARGIN * weights) + context + self.kept_bytes

    def needs(self, needed: int) -> str:
        """What is needed and what is free, as the end of a sentence."""
        free = as_size(self.memory.free or 0)
        with_context = f"with a context of {self.context()} tokens"
        if self.kept_bytes:
            with_context += f" and `prefix_cache_bytes={self.kept_bytes}`"
        return f"needs {as_size(needed)} {with_context}, and {self.memory.place} has {free} free"

    def size(self, offer: Offer) -> int | None:
        """Bytes of the weights as they are loaded: in the dtype that was asked for, or as they are converted."""
        if offer.bytes is None or offer.format == "gguf":
            return offer.bytes
        stored = stored_bits(self.target.config)
        if offer.makes:
            return offer.bytes * bits(offer.makes) // stored
        return offer.bytes if offer.quantized else offer.bytes * (self._dtype_bits() or stored) // stored

    def context(self) -> int:
        """Tokens that room is left for."""
        longest = text_config(self.target.config).get("max_position_embeddings")
        return self.context_length or min(_USUAL_CONTEXT, longest or _USUAL_CONTEXT)

    def packing(self, offer: Offer, source: ModelSource) -> Packing:
        """The record of the packing that is loaded."""
        return Packing(
            name=offer.name,
            source=source.id,
            of=self.target.id,
            format=offer.format,
            bytes=offer.bytes,
            quantized=offer.quantized,
            converted=offer.converted,
            chosen_by="auto" if self.quantization == "auto" and self.checks_memory else "caller",
            rejected=tuple(self.rejected),
        )

    def error(self) -> PolydraftError:
        """Why no packing can be loaded."""
        if self._smallest is not None:
            needed, offer = self._smallest
            which = f"{offer.source} ({offer.name})"
            alone = len(self.rejected) == 1
            return OutOfMemoryError(
                f"{which} does not fit: it {self.needs(needed)}."
                if alone
                else f"No weights of {self.target.id} fit: even {which} {self.needs(needed)}.",
                self._remedy(needed),
            )
        if self._errors:
            first = self._errors[0]
            return first if isinstance(first, UnsupportedError) else PackingNotFoundError(first.message, first.hint)
        name, form = self.backend.name, self.target.format
        why = " ".join(f"{one.source}: {one.why}" for one in self.rejected)
        loads = f"It loads: {', '.join(sorted(self.backend.formats))}."
        return UnsupportedError(
            f"The backend {name} cannot load {self.target.id}: {why or f'its format is {form}.'}",
            f"{loads} `polydraft pairs` lists published files."
            if why
            else f"{loads} {format_hint(form, but=name, installed=self.others)}".strip(),
        )

    def _remedy(self, needed: int) -> str:
        """What to do where nothing fits."""
        ways = ["Give a smaller `context_length`"]
        if self.quantization != "auto":
            ways.append("leave out `quantization`")
        if self.memory.place != _HERE and needed <= hardware.free_memory():
            ways.append("give `device='cpu'`")
        return f"{', '.join(ways)}, or load a smaller model."

    # --- which of them ------------------------------------------------------------------------------------------------
    def _made_of(self, offer: Offer) -> list[Offer]:
        """What this backend makes of a packing: itself, or conversions."""
        made = self.backend.converts.get(offer.format)
        if made is None:
            return [offer]
        if not offer.is_local:
            problem = offer.problem or (
                f"{self.backend.name} converts {offer.format} weights of this machine only, not of the Hub."
            )
            return [replace(offer, problem=problem)]
        full = replace(offer, converted=True)
        if offer.quantized:
            return [full]
        if self.dtype == "auto":
            return [full, *(replace(full, name=name, dtype="", makes=name) for name in made if name != "none")]
        asked = normal(self.dtype)
        return [replace(full, name=asked, dtype="", makes=self.dtype) if is_quantized(asked) else full]

    def _asked_for(self, found: list[Offer]) -> list[Offer]:
        if self.quantization == "auto":
            usual = [offer for offer in found if normal(offer.name) == _USUAL_FILE]
            # A repository of files was named: that is a packing as it is, and all of them one model.
            return usual[:1] or found if self.target.kind == "hub" and self.target.format == "gguf" else found
        if fitting := [offer for offer in found if offer.is_called(self.quantization)]:
            return fitting
        every = self.offers.of(self.target)
        asked = f"`quantization={shown(self.quantization)}`"
        if elsewhere := [offer for offer in every if offer.is_called(self.quantization)]:
            where = sorted({offer.format for offer in elsewhere})
            raise UnsupportedError(
                f"The backend {self.backend.name} loads no weights of {self.target.id} for {asked}: those are "
                f"{' and '.join(where)} files ({elsewhere[0].source}).",
                f"It loads: {_names(found) or 'none of them'}. "
                f"{format_hint(where[0], but=self.backend.name, installed=self.others)}".strip(),
            )
        made = [one.name for one in self.others if self._makes(one)]
        if made:
            raise UnsupportedError(
                f"The backend {self.backend.name} loads no weights of {self.target.id} for {asked}.",
                f"Use `backend={made[0]!r}`, which makes them.",
            )
        if len(every) == 1 and len(found) < 2 and (every[0].quantized or self.offers.is_packing(self.target)):
            self._refuse_contradiction(every[0], asked)
        failed = " ".join(f"{offer.source} could not be asked: {offer.problem}" for offer in every if offer.problem)
        every += found  # with what is made of them
        known = sorted({offer.name for offer in every if offer.name != UNSTATED}, key=lambda name: (-bits(name), name))
        raise InvalidRequestError(
            f"{self.target.id} has no weights for {asked}. {failed}".strip(),
            f"{did_you_mean(self.quantization, [*known, 'none', 'auto'])} It has: {_names(every)}.".strip(),
            argument="quantization",
        )

    def _makes(self, backend: BackendRecord) -> bool:
        made = backend.converts.get(self.target.format, ()) if self.target.kind != "hub" else ()
        return normal(self.quantization) in map(normal, made)

    def _refuse_contradiction(self, offer: Offer, asked: str) -> NoReturn:
        base = self.offers.base_of(self.target)
        are = f"quantized: {offer.name}" if offer.quantized else "not quantized"
        raise InvalidRequestError(
            f"{asked} contradicts {self.target.id}, whose weights are {are}.",
            f"Leave it out{f', or load {base} with it' if base else ''}.",
            argument="quantization",
        )

    def _within_level(self, offer: Offer) -> tuple[int, ...]:
        if offer.quantized:
            return (offer.converted, -(offer.bytes or 0), offer.place)
        # An engine's own format before one that it converts or reads as well; the target's own dtype before others.
        return (offer.format == "safetensors", (offer.dtype or normal(offer.name)) != self._own_dtype(), offer.place)

    def _own_dtype(self) -> str:
        config = self.target.config
        return dtype_name(checkpoint_dtype(config)) if names_dtype(config) else "bf16"

    def _dtype_bits(self) -> int:
        """Bits of the dtype that was asked for; 0 for ``auto`` and an engine's own names."""
        return bits(self.dtype) if self.dtype != "auto" and not is_quantized(self.dtype) else 0


def _level(offer: Offer) -> int:
    return offer.level


def _names(offers: list[Offer]) -> str:
    found = {offer.name: offer for offer in offers if offer.name != UNSTATED}
    return ", ".join(sorted(found, key=lambda name: (-bits(name), name)))
