"""From ``load``'s arguments to a checked ``LoadRequest`` and the backend that takes it. Nothing is loaded here."""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polydraft._containment import plugin_errors
from polydraft._isolation import Isolator
from polydraft._plugins import default_host
from polydraft._registry.backends import format_engine, format_hint, usual_install
from polydraft._registry.diagnosing import DIAGNOSIS_LIMIT, backend_state, diagnose_all
from polydraft._registry.drafters import DrafterChoice
from polydraft._registry.faults import FaultRegistry
from polydraft._registry.offers import Offers
from polydraft._registry.options import check_options
from polydraft._registry.packing_choice import Memory, PackingChoice, PackingNotFoundError, memory_of
from polydraft._registry.packings import PackingRegistry
from polydraft._registry.pairs import PairRegistry
from polydraft._registry.states import BackendState, check_device_of_any
from polydraft.checkpoints._names import KnownNames, Role, is_path, parse, repository
from polydraft.checkpoints._quantization import bits
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.compatibility import check_target
from polydraft.checkpoints.config import model_types
from polydraft.contract.backend import Backend, EngineOptions
from polydraft.contract.records import BackendRecord, Capabilities
from polydraft.contract.requests import ChosenBy, HubOptions, LoadRequest, ModelSource, SpeculationPlan
from polydraft.engine_parts._context import check_context_length
from polydraft.engine_parts.server_options import ServerOptions
from polydraft.errors import (
    BackendUnavailableError,
    DeviceError,
    InvalidRequestError,
    OutOfMemoryError,
    PluginError,
    PolydraftError,
    SpeculationUnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polydraft._plugins import PluginHost


__all__ = ["Prepared", "Resolver"]

_log = logging.getLogger("polydraft.load")
_PASSED_OVER = (
    *(BackendUnavailableError, UnsupportedError, DeviceError, PluginError),
    *(OutOfMemoryError, PackingNotFoundError),
)
"""Why ``backend="auto"`` goes on to the next backend."""


@dataclass(frozen=True)
class Prepared:
    """A backend, and the request it will load."""

    backend: Backend
    state: BackendState
    request: LoadRequest
    process_reason: str = ""
    """Why its engine runs in this process, or in a worker."""


class Resolver:
    """Resolves one target: names and states are looked up once, and shared by all backends that are considered.

    Args:
        given: All arguments of ``load``, checked. The revision is the target's; drafters are taken at their default
            branch.

    Raises:
        InvalidRequestError: The user's file of pairs is broken.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._host = given["host"] or default_host()
        cache_dir = given["cache_dir"]
        self._hub = HubOptions(
            revision=given["revision"],
            cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
            token=given["token"],
            local_files_only=given["local_files_only"],
        )
        self._pairs = PairRegistry.of(self._host)
        self._faults = FaultRegistry.of(self._host)
        packings = PackingRegistry.load()
        self._known = KnownNames(self._host.local_models(), packings.formats() | self._pairs.formats())
        self._offers = Offers(packings, self._hub, lambda name: self._resolve(name, "packing"))
        self._resolved: dict[tuple[str | Path, Role | Literal["packing"]], ModelSource | PolydraftError] = {}
        self._states: dict[str, BackendState] = {}
        self._told: dict[str, Capabilities] = {}
        self._isolator = Isolator(self._host, given["isolation"])

    def prepare(self, target: str | Path) -> Prepared:
        """Resolve the target, choose the backend and plan speculation; errors are those of ``load``."""
        name = self._given["backend"]
        if name != "auto":  # checked before the target is looked for: this needs no network
            check_options(self._isolator.backend(name).options, name, self._given["engine_options"])
            state = self._state(self._host.backends()[name])
            state.check()
            state.check_device(self._given["device"])
        elif all(record.own_names for record in self._host.backends().values()):
            self._refuse_without_hub(target)
        source = self.target(target)
        if self._given["drafter"] in {None, "auto", "ngram"}:  # a named drafter may show that the two are swapped
            check_target(source)
        prepared = self._choose(source) if name == "auto" else self._prepare(self._host.backends()[name], source)
        request = prepared.request
        _log.info("Chosen for %s: %s; %s", source.id, request.backend, _chosen(request.plan))
        if request.packing is not None and request.packing.note:
            _log.info("%s", request.packing.note)
        return prepared

    def _served(self, target: str | Path) -> ModelSource | None:
        """The target where its name is one of the server's own; nothing is looked up."""
        record = self._host.backends().get(self._given["backend"])
        if record is None or not record.own_names or isinstance(target, Path) or not target.strip():
            return None
        written = target.strip()
        at_hand = self._known.format_of(repository(written)) is not None
        # A bare word that is no file, and what only looks like a Hub id.
        if at_hand or written.startswith("builtin:") or is_path(written):
            return None
        return ModelSource(id=written, kind="served", format=min(record.formats))

    def asking(self, **changes: Any) -> Resolver:
        """The same target with other arguments of ``load``; what was looked up is shared."""
        other = copy(self)
        other._given = {**self._given, **changes}
        return other

    @property
    def host(self) -> PluginHost:
        """The plugins."""
        return self._host

    @property
    def hub(self) -> HubOptions:
        """How the target is fetched."""
        return self._hub

    def target(self, name: str | Path) -> ModelSource:
        """The resolved target; errors are those of ``load``."""
        found = self._served(name) or self._resolve(name, "target")
        if self._given["revision"] is not None and found.kind != "hub":
            raise InvalidRequestError(
                f"`revision={self._given['revision']!r}` has no effect: {found.id} is not on the Hub.",
                "Leave it out.",
                argument="revision",
            )
        return found

    def candidates(self, source: ModelSource) -> list[BackendRecord]:
        """The backends that load the target in one of its packings, in order of their names.

        Raises:
            BackendUnavailableError: There is none.
        """
        formats = self._offers.formats(source)
        records = self._host.backends().values()
        found = [record for record in records if formats & record.formats and not record.own_names]
        if not found:
            raise _none_loads(f"{source.id}: its format is {source.format}", source.format)
        return found

    def _refuse_without_hub(self, target: str | Path) -> None:
        """Where no backend is installed that takes files, what the Hub says of a model changes nothing."""
        named = parse(target)
        if named.kind == "hub":
            raise _none_loads(named.value, self._known.format_of(named.value) or "")

    def _choose(self, source: ModelSource) -> Prepared:
        """The usable backend of the highest rank that takes the target; by name where ranks are equal.

        One that would load quantized weights comes after all that load others.
        """
        records = self.candidates(source)
        states = self._diagnosed(records)
        # Highest rank first; a backend that could not diagnose itself counts as 0.
        states.sort(key=lambda state: (-state.diagnosis.rank if state.diagnosis else 0, state.record.name))
        errors: list[tuple[BackendState, PolydraftError]] = []
        quantized: list[Prepared] = []
        for state in states:
            try:
                # Rank 0 means: usable, but never chosen automatically.
                if state.diagnosis and state.diagnosis.usable and state.diagnosis.rank == 0:
                    raise BackendUnavailableError(
                        f"The backend {state.record.name} is used only if it is named.", " ".join(state.diagnosis.notes)
                    )
                prepared = self._prepare(state.record, source)
            except _PASSED_OVER as error:
                _log.info("Backend passed over: %s: %s", state.record.name, error.message)
                errors.append((state, error))
                continue
            if not _is_quantized(prepared):
                return prepared
            quantized.append(prepared)
        if quantized:  # of those of the most bits the one of the highest rank
            return max(quantized, key=_bits)
        if len(errors) == 1:
            raise errors[0][1]
        # If all that can run here refuse for one reason that the caller can change, the error has that reason's class.
        # One of rank 0 was not asked: its refusal says nothing about what the caller asked for.
        classes = {type(error) for state, error in errors if state.usable and state.diagnosis and state.diagnosis.rank}
        if OutOfMemoryError in classes:  # with more memory it would run
            classes = {OutOfMemoryError}
        askable = {DeviceError, OutOfMemoryError, SpeculationUnavailableError} | (
            {UnsupportedError}
            if self._given["exactness"] != "standard" or self._given["quantization"] != "auto"
            else set()
        )
        raised = classes.pop() if len(classes) == 1 and classes <= askable else BackendUnavailableError
        raise raised(
            f"No installed backend can load {source.id} as asked. "
            + " ".join(f"{state.record.name}: {error}" for state, error in errors),
            "`polydraft doctor` shows more about each backend.",
        )

    def _prepare(self, record: BackendRecord, source: ModelSource) -> Prepared:
        """The request for one backend and one target, or the error that says why it cannot load it."""
        # The machine and the device first: planning may read a drafter's config from the Hub.
        given, state = self._given, self._state(record)
        state.check()
        state.check_device(given["device"])
        backend = self._isolator.backend(record.name)
        capabilities = self._capabilities(record, backend)
        if given["exactness"] not in capabilities.exactness:
            raise UnsupportedError(
                f"The backend {record.name} has no `exactness={given['exactness']!r}` here.",
                f"It has: {', '.join(sorted(capabilities.exactness))}.",
            )
        options = check_options(backend.options, record.name, given["engine_options"])
        choice = PackingChoice(
            target=source,
            offers=self._offers,
            backend=record,
            memory=self._memory(state, options),
            others=self._host.backends().values(),
            quantization=given["quantization"],
            context_length=given["context_length"],
            dtype=given["dtype"],
            # A whole engine's own cache lies within the memory that it takes for KV.
            kept_bytes=(given["prefix_cache_bytes"] or 0) if capabilities.exposes_logits else 0,
        )
        for offer in choice:
            try:
                packed = offer.resolve()
            except PolydraftError as error:
                choice.reject(offer, error.message, error)
                continue
            plan = self._plan(record, source, packed, capabilities.max_speculative_tokens)
            with plugin_errors(record.name):
                reason = backend.refuse(packed, plan)
            if reason:
                message = f"The backend {record.name} cannot load this: {reason}"
                choice.reject(offer, reason, UnsupportedError(message, "Try another backend."))
                continue
            if why := choice.too_large(offer, plan.drafter):
                choice.reject(offer, why)
                continue
            request = LoadRequest(
                backend=record.name,
                target=packed,
                plan=plan,
                exactness=given["exactness"],
                context_length=given["context_length"],
                prefix_cache_bytes=given["prefix_cache_bytes"],
                dtype=offer.makes or given["dtype"],
                device=given["device"],
                trust_remote_code=given["trust_remote_code"],
                hub=self._hub,
                engine_options=options,
                packing=choice.packing(offer, packed),
                chosen_by=_chosen_by(given, plan),
            )
            # The config is enough for this, so no weights are fetched in vain.
            check_context_length(request)
            return Prepared(backend, state, request, self._isolator.reason(record.name))
        raise choice.error()

    def _plan(
        self, record: BackendRecord, target: ModelSource, packed: ModelSource, largest: int | None
    ) -> SpeculationPlan:
        """How a session with one packing of the target speculates on one backend."""
        self._faults.check(record, {"import"}, model_types(packed.config) | model_types(target.config))
        choice = DrafterChoice(
            target=packed,
            backend=record,
            registry=self._pairs,
            faults=self._faults,
            resolve=lambda name: self._resolve(name, "drafter"),
            hub=self._hub,
            num_speculative_tokens=self._given["num_speculative_tokens"],
            exactness=self._given["exactness"],
            max_speculative_tokens=largest,
        )
        drafter = self._given["drafter"]
        if packed is not target and drafter not in {None, "auto", "ngram"}:
            drafter = self._following(record, target, packed, drafter)
        return choice.plan(drafter)

    def _following(
        self, record: BackendRecord, target: ModelSource, packed: ModelSource, drafter: str | Path
    ) -> str | Path:
        """The drafter that was named for a target, in the packing that goes with the target's own."""
        named = self._resolve(drafter, "drafter")
        if named.format in record.formats and not (named.kind == "hub" and named.format in record.converts):
            return drafter
        name = repository(named.id).lower()
        kinds = {
            entry.pair.kind
            for entry in self._pairs.find(repository(target.id))
            if (entry.pair.drafter or "").lower() == name
        }
        same = (entry.pair.drafter for entry in self._pairs.find(repository(packed.id)) if entry.pair.kind in kinds)
        return next(filter(None, same), drafter)

    def _memory(self, state: BackendState, options: EngineOptions) -> Memory:
        """The memory that the model must fit into; that of a server which was started elsewhere is not known."""
        if isinstance(options, ServerOptions) and options.url:
            return Memory(None)
        return memory_of(state.diagnosis, self._given["device"])

    def check_device(self, records: Sequence[BackendRecord]) -> None:
        """Refuse a device that none of the backends sees, as ``load`` does with ``backend="auto"``.

        Raises:
            DeviceError: It is not there.
        """
        if self._given["device"] != "auto":
            self._diagnosed(records)

    def _diagnosed(self, records: Sequence[BackendRecord]) -> list[BackendState]:
        """The states of the candidates of ``auto``; none may keep the others waiting, or import its engine for nothing.

        Raises:
            DeviceError: None of them sees the device that is asked for.
        """
        answers = diagnose_all(
            self._host, records, self._faults, seconds=DIAGNOSIS_LIMIT, kept=True, makes=self._isolator
        )
        for name, answer in answers.items():
            self._states[name] = answer.state_of(self._host.backends()[name])
            if answer.capabilities is not None:
                self._told[name] = answer.capabilities
        states = [self._state(record) for record in records]
        check_device_of_any(states, self._given["device"])
        return states

    def _state(self, record: BackendRecord) -> BackendState:
        """Whether a backend can run here; asked once. The one that the caller names may take its time."""
        if record.name not in self._states:
            self._states[record.name] = backend_state(self._isolator, record, self._faults)
        return self._states[record.name]

    def _capabilities(self, record: BackendRecord, backend: Backend) -> Capabilities:
        """What a backend can do, as it told in another process or tells here."""
        if record.name not in self._told:
            with plugin_errors(record.name):
                capabilities = backend.capabilities()
                if not isinstance(capabilities, Capabilities):
                    raise TypeError(f"capabilities() returned a {type(capabilities).__name__}")
            self._told[record.name] = capabilities
        return self._told[record.name]

    def _resolve(self, name: str | Path, role: Role | Literal["packing"]) -> ModelSource:
        """Find a model and read its config, once. The revision that was given is the target's own."""
        if (name, role) not in self._resolved:
            hub = self._hub if role == "target" else self._hub.model_copy(update={"revision": None})
            named: Role = "drafter" if role == "drafter" else "target"
            try:
                self._resolved[name, role] = resolve(name, hub=hub, role=named, known=self._known)
            except PolydraftError as error:  # cached: failing to reach the Hub is slow
                self._resolved[name, role] = error
        found = self._resolved[name, role]
        if isinstance(found, PolydraftError):
            raise found
        return found


def _none_loads(what: str, form: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"No installed backend loads {what}.",
        format_hint(form) or f"Install one: {usual_install()}",
        engine=format_engine(form),
    )


def _is_quantized(prepared: Prepared) -> bool:
    packing = prepared.request.packing
    return packing is not None and packing.quantized and packing.chosen_by == "auto"


def _bits(prepared: Prepared) -> int:
    packing = prepared.request.packing
    return bits(packing.name) if packing is not None else 0


def _chosen_by(given: Mapping[str, Any], plan: SpeculationPlan) -> ChosenBy:
    recommended = plan.chosen_by == "registry"
    return ChosenBy(
        backend="rule" if given["backend"] == "auto" else "caller",
        drafter="caller" if given["drafter"] != "auto" else "recommended" if recommended else "rule",
        num_speculative_tokens=plan.k_chosen_by if plan.kind else "caller" if given["drafter"] is None else "rule",
    )


def _chosen(plan: SpeculationPlan) -> str:
    """The plan as part of a sentence, for the log."""
    if plan.off is not None:
        return f"no speculation. {plan.off.message}"
    drafter = f" with {plan.drafter.id}" if plan.drafter else ""
    k = plan.num_speculative_tokens if plan.max_speculative_tokens is None else f"0..{plan.max_speculative_tokens}"
    return f"{plan.kind}{drafter}, k={k}, chosen by {plan.chosen_by}. {plan.note}".rstrip()
