"""``Backend``, the class that a plugin implements: it loads a stepping engine or a whole engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from polydraft.contract.records import Capabilities, Diagnosis, Exclusion, ServerCommand
from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract.requests import LoadRequest, ModelSource, SpeculationPlan
    from polydraft.contract.stepping import SteppingEngine
    from polydraft.contract.upstream import Upstream
    from polydraft.contract.whole import WholeEngine

__all__ = ["Backend", "EngineOptions"]


class EngineOptions(BaseModel):
    """Base class of a backend's own options, given as ``load(..., engine_options={...})``. Unknown names are errors.

    Errors do not show what was given: it may be a secret. Use ``polydraft.secrets.Secret`` for one.

    No option is ignored in silence. One that only drafters of some kinds use says so, and ``load`` refuses it with
    others: ``Field(..., json_schema_extra={"drafters": ["ngram"]})``. What depends on the device, the model or other
    options, the backend refuses itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Backend(ABC):
    """Connects an engine to polydraft. Created without arguments; imports its engine on the first call."""

    options: ClassVar[type[EngineOptions]] = EngineOptions
    """The pydantic model that ``engine_options`` is checked against."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do with the installed engine version."""

    @abstractmethod
    def diagnose(self) -> Diagnosis:
        """Report whether the backend can run on this machine, and if not, the exact step that fixes it. Must not raise.

        The core has already checked the versions that the record ``requires``.
        """

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why this backend cannot load this target or pair, in one sentence; None if it can.

        Called before any weights are downloaded, and for each candidate of ``backend="auto"``, so that it should not
        import the engine. Weight format and drafter kind have already been checked against the record.
        """
        return None

    def build(self, request: LoadRequest) -> Mapping[str, str] | None:
        """What decides how the engine computes, besides the versions of the distributions that the record names.

        A verification counts only while this stays the same. Called before loading, only where verifications are asked
        for. The core itself adds the versions and builds of the installed distributions, and the plugin's own code.

        Returns:
            Name -> identity: shared libraries or a server's program by their bytes
            (``polydraft.checkpoints.contents``), compile flags, a git commit. The default is empty. None: it cannot be
            known, as for a server that was started elsewhere; such a pair never counts as verified.
        """
        return {}

    @abstractmethod
    def load_engine(self, request: LoadRequest) -> SteppingEngine | WholeEngine:
        """Fetch the weights and load the pair.

        If ``request.exactness`` is ``"bitwise"``, the core then compares a stepping engine's logits bit by bit and
        refuses the pair if they differ.

        Raises:
            ModelFormatError: A file is missing, truncated or of an unknown kind.
            DeviceError: The device does not exist.
            OutOfMemoryError: The weights or the context do not fit.
            UnsupportedError: The request asks for something that the capabilities do not claim.
        """

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command that serves this pair over HTTP, for ``polydraft serve``. Starts nothing.

        Raises:
            UnsupportedError: The engine does not come with a server (the default).
        """
        raise UnsupportedError(
            f"The backend {request.backend} has no server.",
            "Choose one that has (`polydraft backends` lists the installed backends).",
        )

    def upstream(self, request: LoadRequest) -> Upstream | None:
        """The engine's own speculative decoding of this pair, for ``polydraft bench --against upstream``.

        Called before loading. The default is None: the engine has none for this kind of drafter, or polydraft runs it
        anyway, as with a whole engine.
        """
        return None

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """Conformance checks that this backend does not pass, each with its reason."""
        return ()
