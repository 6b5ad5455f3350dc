"""``WorkerBackend``: a backend whose engine runs in a process of its own, in this Python or in another one."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from polydraft._containment import plugin_errors
from polydraft._probes.interpreter import own_python
from polydraft._workers.engine import WorkerEngine
from polydraft._workers.logs import levels_here
from polydraft._workers.messages import PROTOCOL_VERSION, Loaded, Open
from polydraft._workers.process import WorkerProcess
from polydraft.contract.backend import Backend, EngineOptions
from polydraft.contract.records import BackendRecord, Capabilities, Diagnosis, Exclusion, ServerCommand
from polydraft.errors import BackendUnavailableError, InvalidRequestError
from polydraft.secrets import Secret

if TYPE_CHECKING:
    from polydraft.contract.requests import LoadRequest, ModelSource, SpeculationPlan

__all__ = ["WorkerBackend", "crossing_options", "in_worker", "options_from_schema"]

_IDLE = 60.0
"""Seconds that a worker which has answered questions is kept for ``load_engine``."""


def in_worker(capabilities: Capabilities) -> Capabilities:
    """What a backend can do once its engine is in a worker: logits, and what is done to them, stay there."""
    return capabilities.model_copy(
        update={"exposes_logits": False, "sampling": capabilities.sampling - {"logits_processor"}}
    )


class WorkerBackend(Backend):
    """A backend in worker processes. This process imports neither the plugin nor its engine.

    What the backend is asked before it loads (its capabilities, its diagnosis, ...) is asked in a worker, which then
    loads the engine; each further load starts another one.

    Args:
        record: The backend.
        python: The interpreter of the environment that it is installed in; None: this one.
        reason: Why it runs in a worker, one sentence, for ``session.running``.
        capabilities: The backend's own, if they are known without asking.
        options: Its model of options, if this process has it, or that model's JSON schema; None: it is asked.
        exclusions: Its ``conformance_exclusions``, if they are known.
        mend: The command that brings the environment's polydraft to this version.
        variables: Environment variables of the worker, in addition to this process's.

    Raises:
        BackendUnavailableError: It is to run in this interpreter, and this program has none.
    """

    def __init__(
        self,
        record: BackendRecord,
        python: Path | None = None,
        *,
        reason: str = "",
        capabilities: Capabilities | None = None,
        options: type[EngineOptions] | Mapping[str, Any] | None = None,
        exclusions: Iterable[Exclusion] = (),
        mend: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.record = record
        self.reason = reason
        own = own_python() if python is None else python
        if own is None:
            raise BackendUnavailableError(
                f"{record.name} is to run in a process of its own, and this program has no Python to start one with.",
                "Name one with `multiprocessing.set_executable`, or load with `isolation='none'`.",
            )
        self.python = own
        self._capabilities = capabilities
        self._given_options = options
        self._exclusions = tuple(exclusions)
        self._mend = mend or record.install_hint
        self._variables = variables
        self._lock = threading.RLock()
        self._spare: WorkerProcess | None = None
        self._surroundings: tuple[Any, ...] = ()
        self._timer: threading.Timer | None = None

    @property
    def options(self) -> type[EngineOptions]:  # type: ignore[override]
        """The model that ``engine_options`` is checked against; values of another environment's are checked there."""
        if self._given_options is None:
            self._given_options = self._ask("options_schema")
        if isinstance(self._given_options, Mapping):
            self._given_options = options_from_schema(self._given_options)
        return self._given_options

    def capabilities(self) -> Capabilities:
        """The backend's own, without what needs its logits in this process."""
        if self._capabilities is None:
            self._capabilities = Capabilities.model_validate(self._ask("capabilities"))
        return in_worker(self._capabilities)

    def diagnose(self) -> Diagnosis:
        """The backend's own diagnosis."""
        return Diagnosis.model_validate(self._ask("diagnose"))

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """The backend's own answer."""
        refused: str | None = self._ask(
            "refuse", target=target.model_dump(mode="json"), plan=plan.model_dump(mode="json")
        )
        return refused

    def build(self, request: LoadRequest) -> Mapping[str, str] | None:
        """The backend's own answer."""
        found: dict[str, str] | None = self._ask("build", **_crossing(request))
        return found

    def load_engine(self, request: LoadRequest) -> WorkerEngine:
        """Load the engine in a worker.

        Raises:
            PolydraftError: What the backend raises.
            EngineCrashedError: The worker has died meanwhile.
            BackendUnavailableError: It cannot be started, or is of another version.
        """
        worker = self._take() or self._start()
        try:
            worker.await_ready()
            answer = worker.ask("load", _crossing(request), doing=f"while it loaded {request.target.id}")
            return WorkerEngine(worker, Loaded.model_validate(answer.value), self.reason)
        except BaseException:  # Ctrl+C, too: loading is not to go on
            worker.kill()
            raise

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The backend's own answer."""
        found = self._ask("server_command", **_crossing(request), host=host, port=port)
        secret = {name: Secret(text, shell=shell) for name, (text, shell) in found.pop("secrets").items()}
        return ServerCommand(arguments=found["arguments"], environment={**found["environment"], **secret})

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """The backend's own, if they are known."""
        return self._exclusions

    def start(self) -> None:
        """Start the worker that answers the next question, without waiting for it."""
        with self._lock:
            worker = self._take() or self._start()
            self._keep(worker)

    def release(self) -> None:
        """End the worker that is kept for ``load_engine``, if there is one."""
        worker = self._take()
        if worker is not None:
            worker.kill()

    def _ask(self, question: str, **arguments: Any) -> Any:
        with plugin_errors(self.record.name), self._lock:
            worker = self._take() or self._start()
            worker.await_ready()
            try:
                return worker.ask(question, arguments, doing="before it was loaded").value
            finally:
                self._keep(worker)

    def _start(self) -> WorkerProcess:
        from importlib.metadata import version

        self._surroundings = _surroundings()
        worker = WorkerProcess(self.record.name, self.python, variables=self._variables, mend=self._mend)
        worker.send(
            Open(
                protocol=PROTOCOL_VERSION,
                polydraft=version("polydraft"),
                factory=self.record.factory,
                name=self.record.name,
                levels=levels_here(),
            )
        )
        return worker

    def _take(self) -> WorkerProcess | None:
        """The worker that was kept, which is now the caller's."""
        with self._lock:
            worker, self._spare = self._spare, None
            if self._timer is not None:
                self._timer.cancel()
            if worker is not None and (not worker.alive or self._surroundings != _surroundings()):
                worker.kill()  # it would not see what the app has set since
                return None
            return worker

    def _keep(self, worker: WorkerProcess) -> None:
        if worker.alive:
            self._spare = worker
            self._timer = threading.Timer(_IDLE, self.release)
            self._timer.daemon = True
            self._timer.start()


def _surroundings() -> tuple[Any, ...]:
    """What a worker takes from this process when it starts."""
    try:
        folder = os.getcwd()  # noqa: PTH109 - only compared
    except OSError:  # it was removed
        folder = ""
    return dict(os.environ), folder, tuple(sys.path)


class _OpenOptions(EngineOptions):
    """Options whose backend takes others than it names, and checks them where its engine is."""

    model_config = ConfigDict(extra="allow", frozen=True)


def options_from_schema(schema: Mapping[str, Any]) -> type[EngineOptions]:
    """A model of the names of options, and of which drafters use them, for a backend whose own is elsewhere."""
    fields: dict[str, Any] = {
        name: (Any, Field(default=None, json_schema_extra={key: told[key] for key in ("drafters",) if key in told}))
        for name, told in schema.get("properties", {}).items()
    }
    base = _OpenOptions if schema.get("additionalProperties") is True else EngineOptions
    return create_model(str(schema.get("title", "EngineOptions")), __base__=base, **fields)


def _crossing(request: LoadRequest) -> dict[str, Any]:
    """A request as data. Secrets are written out: the pipe is read by the worker only."""
    data = request.model_dump(mode="json", exclude={"engine_options", "hub"})
    data["hub"] = _plain({name: getattr(request.hub, name) for name in type(request.hub).model_fields})
    options = None if request.engine_options is None else crossing_options(request.engine_options)
    return {"request": data, "options": options}


def crossing_options(options: Mapping[str, Any] | EngineOptions, or_else: str = "load with `isolation='none'`") -> Any:
    """Engine options as data for another process of this user, with their secrets.

    Raises:
        InvalidRequestError: They hold what JSON has not; ``or_else`` is the hint's second way.
    """
    plain = _plain(options)
    try:
        json.dumps(plain)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"The engine options hold what cannot be given to another process: {error}.",
            f"Give numbers, texts, lists and dicts; or {or_else}.",
            argument="engine_options",
        ) from error
    return plain


def _plain(value: Any) -> Any:
    """Options as JSON-ready data, as they were given: defaults are the backend's."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, BaseModel):
        # Not by attribute: further options of an open model may have the name of one of its methods.
        given = {**value.__dict__, **(value.model_extra or {})}
        return {name: _plain(given[name]) for name in value.model_fields_set}
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
