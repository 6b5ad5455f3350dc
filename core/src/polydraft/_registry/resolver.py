"""From ``load``'s arguments to a checked ``LoadRequest`` and the backend that takes it. Nothing is loaded here."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polydraft._registry import known_names
from polydraft._registry.backends import known_backends
from polydraft._registry.drafters import plan_speculation
from polydraft._registry.faults import FaultRegistry
from polydraft._registry.pairs import PairRegistry
from polydraft._registry.states import BackendState, backend_state
from polydraft._registry.versions import VersionLookup, installed_version
from polydraft.checkpoints._names import did_you_mean
from polydraft.checkpoints._resolve import KnownNames, Role, resolve
from polydraft.checkpoints.compatibility import check_target
from polydraft.checkpoints.config import model_types
from polydraft.contract.backend import Backend, EngineOptions
from polydraft.contract.requests import HubOptions, LoadRequest, ModelSource, SpeculationPlan
from polydraft.engines.context import check_context_length
from polydraft.errors import (
    BackendUnavailableError,
    DeviceError,
    InvalidRequestError,
    PluginError,
    PolydraftError,
    SpeculationUnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from polydraft._load_arguments import LoadArguments
    from polydraft._plugins import PluginHost
    from polydraft.contract.records import BackendRecord

__all__ = ["Prepared", "Resolver", "check_options"]

_log = logging.getLogger("polydraft.load")


@dataclass(frozen=True)
class Prepared:
    """A backend, and the request that it is to load."""

    backend: Backend
    state: BackendState
    request: LoadRequest


class Resolver:
    """Resolves one target: what is known is looked up once, and shared by all backends that are considered.

    Args:
        host: The plugins.
        hub: How to reach the Hub. The revision is the target's; drafters are taken at their default branch.
        lookup: Gives installed versions.

    Raises:
        InvalidRequestError: The user's file of pairs is broken.
    """

    def __init__(
        self, host: PluginHost, hub: HubOptions | None = None, *, lookup: VersionLookup = installed_version
    ) -> None:
        self.host = host
        self.hub = hub or HubOptions()
        self.registry = PairRegistry.of(host)
        self.faults = FaultRegistry.of(host, lookup)
        self.known: KnownNames = known_names(host, self.registry)
        self._resolved: dict[tuple[str | Path, Role], ModelSource | PolydraftError] = {}
        self._states: dict[str, BackendState] = {}

    def target(self, name: str | Path) -> ModelSource:
        """Resolve the target. Errors as for ``polydraft.checkpoints._resolve``."""
        return self._resolve(name, "target")

    def drafter(self, name: str | Path) -> ModelSource:
        """Resolve a drafter. Errors as for ``polydraft.checkpoints._resolve``."""
        return self._resolve(name, "drafter")

    def _resolve(self, name: str | Path, role: Role) -> ModelSource:
        key = (name, role)
        if key not in self._resolved:
            hub = self.hub if role == "target" else self.hub.model_copy(update={"revision": None})
            try:
                self._resolved[key] = resolve(name, hub=hub, role=role, known=self.known)
            except PolydraftError as error:  # kept: an unreachable Hub takes long to be unreachable
                self._resolved[key] = error
        found = self._resolved[key]
        if isinstance(found, PolydraftError):
            raise found
        return found

    def state(self, record: BackendRecord) -> BackendState:
        """Whether a backend can run here; asked once."""
        if record.name not in self._states:
            self._states[record.name] = backend_state(self.host, record, self.faults)
        return self._states[record.name]

    def plan(
        self,
        target: ModelSource,
        drafter: str | Path | None,
        record: BackendRecord,
        k: int | None = None,
        k_max: int | None = None,
    ) -> SpeculationPlan:
        """How this backend would speculate on the target. Errors as for ``plan_speculation``."""
        return plan_speculation(
            target,
            drafter,
            backend=record,
            registry=self.registry,
            faults=self.faults,
            resolve=self.drafter,
            hub=self.hub,
            num_speculative_tokens=k,
            max_speculative_tokens=k_max,
        )

    def prepare(self, target: str | Path, arguments: LoadArguments) -> Prepared:
        """Resolve the target, choose the backend and plan speculation; everything is checked, nothing is loaded.

        Args:
            target: As for ``load``.
            arguments: All of ``load``'s, checked.

        Raises:
            PolydraftError: As for ``load``.
        """
        backend, drafter = arguments["backend"], arguments["drafter"]
        if backend != "auto":
            # Before the target is looked for: these need no network.
            check_options(self.host.backend(backend), backend, arguments["engine_options"])
            record = self.host.backends()[backend]
            self.state(record).check()
        source = self.target(target)
        if drafter in {None, "auto", "ngram"}:
            check_target(source)  # before backends are considered: the clearest error comes first
        prepared = self._choose(source, arguments) if backend == "auto" else self._prepare(record, source, arguments)
        name = prepared.request.backend
        options = check_options(prepared.backend, name, arguments["engine_options"])
        prepared = replace(prepared, request=prepared.request.model_copy(update={"engine_options": options}))
        plan = prepared.request.plan
        _log.info(
            "%s: backend %s (%s), drafter %s, method %s, k=%d (%s)%s",
            source.id,
            name,
            "asked for" if backend != "auto" else "highest rank of those that can load it",
            plan.drafter.id if plan.drafter else None,
            plan.kind,
            plan.num_speculative_tokens,
            plan.chosen_by,
            f": {plan.note or plan.off.message if plan.off else plan.note}" if plan.note or plan.off else "",
        )
        return prepared

    def _prepare(self, record: BackendRecord, source: ModelSource, arguments: LoadArguments) -> Prepared:
        """The request for one backend and one target, or the error that says why it cannot load it."""
        if source.format not in record.formats:
            raise UnsupportedError(
                f"The backend {record.name} cannot load {source.id}: its format is {source.format}.",
                f"It loads: {', '.join(sorted(record.formats))}. {_format_hint(source.format, record.name)}".strip(),
            )
        state = self.state(record)
        state.check()
        _check_device(state, arguments["device"])
        backend = self.host.backend(record.name)
        capabilities = backend.capabilities()
        if arguments["exactness"] not in capabilities.exactness:
            raise UnsupportedError(
                f"The backend {record.name} has no exactness={arguments['exactness']!r} here.",
                f"It has: {', '.join(sorted(capabilities.exactness))}.",
            )
        self.faults.check(record, {"import"}, model_types(source.config))
        k = arguments["num_speculative_tokens"]
        plan = self.plan(source, arguments["drafter"], record, k, capabilities.max_speculative_tokens)
        if reason := backend.refuse(source, plan):
            raise UnsupportedError(f"The backend {record.name} cannot load this: {reason}", "Try another backend.")
        request = LoadRequest(
            backend=record.name,
            target=source,
            plan=plan,
            exactness=arguments["exactness"],
            context_length=arguments["context_length"],
            dtype=arguments["dtype"],
            device=arguments["device"],
            trust_remote_code=arguments["trust_remote_code"],
            hub=self.hub,
        )
        check_context_length(request)
        return Prepared(backend, state, request)

    def _choose(self, source: ModelSource, arguments: LoadArguments) -> Prepared:
        """The usable backend of the highest rank that takes the target; by name where ranks are equal."""
        records = [record for record in self.host.backends().values() if source.format in record.formats]
        if not records:
            raise BackendUnavailableError(
                f"No installed backend loads {source.id}: its format is {source.format}.",
                _format_hint(source.format) or _install_hint(),
            )
        errors: list[tuple[str, BackendUnavailableError | UnsupportedError | DeviceError | PluginError]] = []

        def rank(record: BackendRecord) -> tuple[int, str]:
            diagnosis = self.state(record).diagnosis
            return (-diagnosis.rank if diagnosis else 0, record.name)

        for record in sorted(records, key=rank):
            try:
                prepared = self._prepare(record, source, arguments)
            except (BackendUnavailableError, UnsupportedError, DeviceError, PluginError) as error:
                _log.info("%s is passed over: %s", record.name, error.message)
                errors.append((record.name, error))
                continue
            return prepared
        if len(errors) == 1:
            raise errors[0][1]
        # One class for all that could run: what the caller asked for is at fault, not the backends.
        usable = {record.name for record in records if self.state(record).usable}
        classes = {type(error) for name, error in errors if name in usable}
        askable = {DeviceError, SpeculationUnavailableError} | (
            {UnsupportedError} if arguments["exactness"] != "standard" else set()
        )
        raised = classes.pop() if len(classes) == 1 and classes <= askable else BackendUnavailableError
        raise raised(
            f"No installed backend can load {source.id} as asked. "
            + " ".join(f"{name}: {error.message} {error.hint}".strip() for name, error in errors),
            "`polydraft doctor` says more of each backend.",
        )


def check_options(backend: Backend, name: str, given: Mapping[str, Any] | EngineOptions | None) -> EngineOptions:
    """Check ``engine_options`` against the backend's own model.

    Raises:
        InvalidRequestError: An option is unknown or its value is wrong; the sentence names it and the known ones.
    """
    model = type(backend).options
    if isinstance(given, EngineOptions):
        if type(given) is not model:
            raise InvalidRequestError(
                f"engine_options is a {type(given).__name__}; the backend {name} takes {model.__name__}.",
                "Give a dict, or an instance of that class.",
            )
        return given
    known = sorted(model.model_fields)
    listed = f"Known options of {name}: {', '.join(known)}." if known else f"The backend {name} has no options."
    try:
        return model.model_validate(dict(given or {}))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InvalidRequestError(
                f"The backend {name} has no option {option!r}.", f"{did_you_mean(option, known)} {listed}".strip()
            ) from error
        raise InvalidRequestError(f"The option {option!r} of {name} is wrong: {first['msg']}.", listed) from error


def _check_device(state: BackendState, device: str) -> None:
    """Check a device against those that the backend sees, where it says so."""
    devices = [found.name for found in state.diagnosis.devices] if state.diagnosis else []
    if device == "auto" or not devices or device in devices:
        return
    kinds = {name.partition(":")[0] for name in devices}
    kind, _, index = device.partition(":")
    if kind in kinds and (not index or (index == "0" and kind in devices)):
        return
    raise DeviceError(
        f"The backend {state.record.name} sees no device {device!r} here.", f"It sees: {', '.join(devices)}."
    )


def _format_hint(form: str, but: str = "") -> str:
    """Which known backends load a format, and how to get them."""
    fitting = [known for known in known_backends() if form in known.formats and known.name != but]
    if not fitting:
        return ""
    installs = [known.install for known in fitting if known.install]
    if installs:
        return f"Install one that does: {installs[0]}"
    names = " or ".join(known.name for known in fitting)
    return f"That format is for {names}, of which this version of polydraft has no backend."


def _install_hint() -> str:
    return "Install one: " + next(known.install for known in known_backends() if known.install)
