"""Choose how a session speculates: which drafter, which k, or why not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polydraft import reasons
from polydraft._registry.candidates import Candidate, DrafterLookup, candidates
from polydraft._registry.faults import FaultRegistry, distributions
from polydraft._registry.pairs import DEFAULT_K, PairRegistry, RegisteredPair
from polydraft._registry.versions import older_than
from polydraft.checkpoints._names import repository
from polydraft.checkpoints.compatibility import check_pair
from polydraft.checkpoints.config import drafter_kind, model_types
from polydraft.checkpoints.litertlm import DRAFTER_INSIDE
from polydraft.contract.requests import ModelSource, SpeculationPlan
from polydraft.errors import InvalidRequestError, PolydraftError, SpeculationUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from polydraft.contract.records import BackendRecord, DrafterKind, Exactness, FaultRecord
    from polydraft.contract.requests import HubOptions

__all__ = ["DrafterChoice"]

_log = logging.getLogger("polydraft.load")


class _Refusal(Exception):  # noqa: N818 - caught in this module, never seen outside
    """Why a drafter cannot be used; ``fault`` where a known fault is the cause."""

    def __init__(self, reason: str, fault: tuple[FaultRecord, str] | None = None) -> None:
        super().__init__(reason)
        self.fault = fault


@dataclass(frozen=True, kw_only=True)
class DrafterChoice:
    """How a session speculates on one backend. Configs are read, no weights."""

    target: ModelSource
    """``check_target`` has passed it unless a drafter is named."""
    backend: BackendRecord
    registry: PairRegistry
    faults: FaultRegistry
    """The known faults, with the installed versions."""
    resolve: DrafterLookup
    hub: HubOptions | None = None
    """For the tokenizers of a ``draft-model`` pair and the files of a GGUF repository; None: only local ones."""
    num_speculative_tokens: int | Literal["auto"] | None = None
    """k, if the caller gave one; else the registry's for this backend, else 4."""
    exactness: Exactness = "standard"
    """With ``bitwise`` each step costs as much as one with the largest k."""
    max_speculative_tokens: int | None = None
    """The backend's largest k."""

    def plan(self, drafter: str | Path | None = "auto") -> SpeculationPlan:
        """Decide on a drafter.

        ``auto`` takes the first drafter that this backend can run and that fits the target: from the registry; from a
        folder next to the target (``<target>-assistant``, ``<target>-draft``, or the one assistant there whose config
        fits); from the registry, by the model that the checkpoint says it is a copy of; else n-gram drafting with a
        note that says why; else none, with the reason in ``off``.

        Args:
            drafter: ``auto``, ``ngram``, None for plain decoding, or a drafter's id or path.

        Raises:
            PairMismatchError: The caller's drafter does not fit.
            SpeculationUnavailableError: The backend cannot run the caller's drafter.
            BackendUnavailableError: A known fault of the installed engine forbids the caller's drafter.
            ModelNotFoundError: The caller's drafter does not exist or cannot be reached.
            InvalidRequestError: k is larger than the backend's largest, or not the one that the target's file fixes.
        """
        if drafter is None:
            return SpeculationPlan(off=reasons.by_caller())
        if self.target.kind == "served" and drafter == "auto":
            return self._plan("mtp", None, "config")  # whether there is one, its server knows
        if drafter == "auto":
            return self._auto()
        if drafter == "ngram":
            self._check_kind("ngram", "n-gram drafting")
            self.faults.check(self.backend, ["ngram"], self._types(None))
            return self._plan("ngram", None, "caller")
        return self._named(drafter)

    def _auto(self) -> SpeculationPlan:
        refusals: list[str] = []
        fault: tuple[FaultRecord, str] | None = None
        for candidate in candidates(self.target, self.registry, self.resolve, self.hub):
            try:
                source = self._usable(candidate)
            except _Refusal as refusal:
                refusals.append(f"{candidate.name}: {refusal}")
                # Candidates come best first, so the first fault is the one to report.
                fault = fault or refusal.fault
            except PolydraftError as error:
                refusals.append(f"{candidate.name}: {error.message}")
            else:
                return self._plan(candidate.kind, source, candidate.chosen_by, candidate.note, candidate.entry)
            _log.info("Drafter passed over: %s", refusals[-1])
        why = " ".join(dict.fromkeys(refusals)) or f"No drafter is known for {self.target.id}."
        forbidden = self.faults.refusal(self.backend, ["ngram"], self._types(None))
        if "ngram" in self.backend.drafter_kinds and forbidden is None:
            return self._plan("ngram", None, "fallback", f"Drafts are looked up in the text so far (n-gram): {why}")
        off = reasons.by_fault(*fault) if fault else reasons.no_drafter(self.target.id, why)
        return SpeculationPlan(off=off, note=why)

    def _named(self, drafter: str | Path) -> SpeculationPlan:
        source = self.resolve(drafter)
        entry = self._known(source)
        kind = entry.pair.kind if entry else _kind_of(source)
        # Before the backend: a drafter of another target is wrong on all of them.
        if self.target.kind != "served":
            check_pair(self.target, source, kind, hub=self.hub)
        self._check_kind(kind, source.id)
        if source.format not in self.backend.formats:
            raise SpeculationUnavailableError(
                f"The backend {self.backend.name} cannot load the drafter {source.id}: its format is {source.format}.",
                f"Give one of: {', '.join(sorted(self.backend.formats))}.",
            )
        self.faults.check(self.backend, [kind], self._types(source))
        if entry is not None and entry.pair.drafter_file and source.file is None:
            source = source.model_copy(update={"file": entry.pair.drafter_file})
        return self._plan(kind, source, "caller", entry=entry)

    def _usable(self, candidate: Candidate) -> ModelSource | None:
        """The candidate's source, if this backend can run it with this target."""
        if candidate.kind not in self.backend.drafter_kinds:
            raise _Refusal(f"the backend {self.backend.name} has no drafters of kind {candidate.kind}.")
        for name, first in candidate.entry.pair.min_versions.items() if candidate.entry else ():
            version = self.faults.lookup(self.backend, name)
            if name in distributions(self.backend) and version is not None and older_than(version, first):
                raise _Refusal(f"it needs {name}>={first}, {version} is installed.")
        # Only now: this may read a config from the Hub.
        source = candidate.source()
        if source is not None and source.format not in self.backend.formats:
            raise _Refusal(f"the backend {self.backend.name} cannot load the format {source.format}.")
        found = self.faults.refusal(self.backend, [candidate.kind], self._types(source))
        if found is not None:
            fault, version = found
            raise _Refusal(f"{fault.distribution} {version}: {fault.summary} {fault.remedy}.", found)
        if source is not None:
            check_pair(self.target, source, candidate.kind, hub=self.hub)
        return source

    def _known(self, drafter: ModelSource) -> RegisteredPair | None:
        """The registry's entry for exactly this pair."""
        name = repository(drafter.id).lower()
        return next(
            (e for e in self.registry.find(repository(self.target.id)) if (e.pair.drafter or "").lower() == name), None
        )

    def _check_kind(self, kind: DrafterKind, name: str) -> None:
        if kind not in self.backend.drafter_kinds:
            raise SpeculationUnavailableError(
                f"The backend {self.backend.name} cannot run {name}: it has no drafters of kind {kind}.",
                f"It has: {', '.join(sorted(self.backend.drafter_kinds)) or 'none'}; or use another backend.",
            )

    def _types(self, source: ModelSource | None) -> frozenset[str]:
        return model_types(self.target.config) | (model_types(source.config) if source else frozenset())

    def _warnings(self, kind: DrafterKind, source: ModelSource | None) -> list[str]:
        """Sentences about faults that do not forbid speculation but that the user should know of."""
        affects = [kind, "sampling", "statistics"]
        found = self.faults.faults_of(self.backend, affects=affects, model_types=self._types(source))
        return [f"{fault.distribution} {version}: {fault.summary} {fault.remedy}" for fault, version in found]

    def _plan(
        self,
        kind: DrafterKind,
        source: ModelSource | None,
        chosen_by: Literal["caller", "registry", "sibling", "config", "fallback"],
        note: str = "",
        entry: RegisteredPair | None = None,
    ) -> SpeculationPlan:
        recommended = entry.num_speculative_tokens(self.backend.name) if entry else None
        given = self.num_speculative_tokens
        inside = self.target.config.get(DRAFTER_INSIDE) if self.target.format == "litertlm" else None
        if inside is not None:
            recommended = inside["num_speculative_tokens"]
            if isinstance(given, int) and given != recommended:
                raise InvalidRequestError(
                    f"`num_speculative_tokens={given}` is not possible: the drafter inside {self.target.id} always "
                    f"drafts {recommended} tokens.",
                    f"Leave it out, or give `num_speculative_tokens={recommended}`.",
                    argument="num_speculative_tokens",
                )
        k = given if isinstance(given, int) else recommended or DEFAULT_K
        notes = [note] if note else []
        largest = self.max_speculative_tokens
        if largest is not None and k > largest:
            if isinstance(given, int):
                raise InvalidRequestError(
                    f"`num_speculative_tokens={k}` is too large: {self.backend.name} drafts at most {largest}.",
                    f"Give `num_speculative_tokens={largest}` or less.",
                    argument="num_speculative_tokens",
                )
            notes.append(f"k is {largest}, the backend's largest; {k} is recommended.")
            k = largest
        notes += self._warnings(kind, source)
        most = None
        if given == "auto":
            most = k if self.exactness == "bitwise" else 2 * k
            most = most if largest is None else min(most, largest)
        return SpeculationPlan(
            kind=kind,
            drafter=source,
            num_speculative_tokens=k,
            max_speculative_tokens=most,
            chosen_by=chosen_by,
            k_chosen_by="caller" if given is not None else "recommended" if recommended else "rule",
            note=" ".join(notes),
        )


def _kind_of(source: ModelSource) -> DrafterKind:
    """The kind of a drafter that the caller named: published GGUF drafters say ``mtp-`` in their names."""
    name = (source.file or source.id).rpartition("/")[2].lower()
    if source.format == "gguf" and name.startswith("mtp-"):
        return "mtp"
    return drafter_kind(source.config) if source.config else "draft-model"
