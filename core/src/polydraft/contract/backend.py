"""``SpeculativeBackend``: what a plugin implements. A stepping engine subclasses ``SteppingBackend`` instead."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from polydraft.contract.records import Capabilities, Diagnosis, Exclusion, ServerCommand
from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract.requests import LoadRequest, ModelSource, SpeculationPlan
    from polydraft.contract.stepping import SteppingEngine
    from polydraft.session.base import Session

__all__ = ["EngineOptions", "SpeculativeBackend", "SteppingBackend"]


class EngineOptions(BaseModel):
    """Base of a backend's own options: ``load(..., engine_options={...})``. Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SpeculativeBackend(ABC):
    """An engine behind polydraft's API. Made without arguments; importing the engine waits for the first call."""

    options: ClassVar[type[EngineOptions]] = EngineOptions
    """The pydantic model that ``engine_options`` is checked against."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do with the installed engine version."""

    @abstractmethod
    def diagnose(self) -> Diagnosis:
        """Whether it can run here, and if not, the exact step that mends it. Must not raise."""

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why this target (or pair) cannot be loaded by this backend, one sentence; None if it can.

        Called before any download of weights, by ``backend="auto"`` too. Formats and drafter kinds have been
        checked against the record.
        """
        return None

    @abstractmethod
    def load(self, request: LoadRequest) -> Session:
        """Fetch the weights, load the pair and return the session.

        Raises:
            ModelFormatError: A file is missing, truncated or of an unknown kind.
            DeviceError: The device is not there.
            OutOfMemoryError: Weights or context do not fit.
            UnsupportedError: The request asks for what the capabilities do not claim.
        """

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command that serves this pair over HTTP, for ``polydraft serve``. Starts nothing.

        Raises:
            UnsupportedError: By default: the engine has no server of its own.
        """
        raise UnsupportedError(
            "This backend has no server.", "Use one that has, such as vllm (`polydraft backends` lists them)."
        )

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """Conformance checks that this backend does not pass, each with its reason."""
        return ()


class SteppingBackend(SpeculativeBackend):
    """A backend whose engine lets the core run the loop: implement ``load_engine``."""

    @abstractmethod
    def load_engine(self, request: LoadRequest) -> SteppingEngine:
        """Fetch the weights and load the pair. Errors as for ``load``."""

    def load(self, request: LoadRequest) -> Session:
        """A session of the core's loop over ``load_engine``'s engine; ``exactness="bitwise"`` is measured first.

        Raises:
            UnsupportedError: Beyond ``load_engine``'s own: ``bitwise`` was asked for and does not hold here.
        """
        from polydraft.loop.fixed_steps import check_fixed_steps
        from polydraft.session.stepping import SteppingSession

        started = time.monotonic()
        engine = self.load_engine(request)
        try:
            note = ""
            if request.exactness == "bitwise":
                note = check_fixed_steps(engine, request, time.monotonic() - started)
            return SteppingSession(engine, request, self.capabilities(), notes=(note,) if note else ())
        except BaseException:
            engine.close()
            raise
