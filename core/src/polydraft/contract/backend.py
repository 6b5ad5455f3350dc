"""``Backend``: what a plugin implements. It loads a stepping engine or a whole engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from polydraft.contract.records import Capabilities, Diagnosis, Exclusion, ServerCommand
from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract.requests import LoadRequest, ModelSource, SpeculationPlan
    from polydraft.contract.stepping import SteppingEngine
    from polydraft.contract.whole import WholeEngine

__all__ = ["Backend", "EngineOptions"]


class EngineOptions(BaseModel):
    """Base of a backend's own options: ``load(..., engine_options={...})``. Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Backend(ABC):
    """An engine behind polydraft's API. Created without arguments; it imports its engine on the first call."""

    options: ClassVar[type[EngineOptions]] = EngineOptions
    """The pydantic model that ``engine_options`` is checked against."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do with the installed engine version."""

    @abstractmethod
    def diagnose(self) -> Diagnosis:
        """Whether the backend can run here, and if not, the exact step that fixes it. Must not raise.

        The versions that the record ``requires`` have been found installed.
        """

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why this target (or pair) cannot be loaded by this backend, one sentence; None if it can.

        Called before any weights are downloaded, by ``backend="auto"`` too. Formats and drafter kinds have been
        checked against the record.
        """
        return None

    @abstractmethod
    def load_engine(self, request: LoadRequest) -> SteppingEngine | WholeEngine:
        """Fetch the weights and load the pair.

        With ``request.exactness == "bitwise"`` the core compares the bits of a stepping engine's steps afterwards, and
        refuses the pair if they differ.

        Raises:
            ModelFormatError: A file is missing, truncated or of an unknown kind.
            DeviceError: The device does not exist.
            OutOfMemoryError: Weights or context do not fit.
            UnsupportedError: The request asks for something that the capabilities do not claim.
        """

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command that serves this pair over HTTP, for ``polydraft serve``. Starts nothing.

        Raises:
            UnsupportedError: By default: the engine has no server of its own.
        """
        raise UnsupportedError(
            f"The backend {request.backend} has no server.",
            "Choose one that has (`polydraft backends` lists the installed backends).",
        )

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """Conformance checks that this backend does not pass, each with its reason."""
        return ()
