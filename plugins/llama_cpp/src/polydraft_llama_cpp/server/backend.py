"""The backend ``llama-server``."""

from __future__ import annotations

from typing import Literal

from polydraft._session import Session
from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    EngineOptions,
    LoadRequest,
    ModelSource,
    SpeculationPlan,
)
from polydraft.errors import BackendUnavailableError
from pydantic import Field

from polydraft_llama_cpp.options import CacheType
from polydraft_llama_cpp.server import program as programs

__all__ = ["LlamaServerBackend", "LlamaServerOptions"]


class LlamaServerOptions(EngineOptions):
    """Options by llama.cpp's names. For a server that runs already they must be its own: they are not sent."""

    n_batch: int = Field(default=512, ge=1)
    n_gpu_layers: int | None = Field(default=None, ge=-1, description="None: the server's own choice.")
    threads: int | None = Field(default=None, ge=1)
    type_k: CacheType = "auto"
    type_v: CacheType = "auto"
    flash_attn: Literal["auto", "on", "off"] = "auto"
    start_seconds: float = Field(default=300.0, gt=0, description="How long the server may take to load the model.")
    api_key: str | None = Field(default=None, repr=False, description="Of a server that runs already.")
    extra_args: tuple[str, ...] = Field(default=(), description="Further flags for the server.")


class LlamaServerBackend(Backend):
    """Starts the user's llama-server, or uses one that runs."""

    options = LlamaServerOptions

    def capabilities(self) -> Capabilities:
        """What its HTTP interface offers. Drafted tokens have no log-probabilities there: they are not claimed."""
        return Capabilities(
            drafter_kinds=frozenset({"mtp", "draft-model"}),
            sampling=frozenset({"temperature", "top_p", "top_k", "min_p", "seed"}),
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Look for the program, and ask it for its version."""
        place = programs.find()
        remedy = f"Set {programs.VARIABLE} to the path of llama-server, or to the URL of a running one."
        if place is None:
            return Diagnosis(usable=False, reason="No llama-server was found.", remedy=remedy)
        devices: list[str] = []
        if programs.is_url(place):
            version, note = "unknown", f"The server at {place}."
        else:
            try:
                found = programs.program(place)
            except BackendUnavailableError as error:
                return Diagnosis(usable=False, reason=error.message, remedy=remedy)
            version, note, devices = found.version, found.path, list(found.devices)
        return Diagnosis(
            usable=True,
            engine_version=version,
            devices=tuple(DeviceRecord(name=name) for name in ("cpu", *devices)),
            notes=(note,),
            rank=20,
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """As the backend in this process."""
        from polydraft_llama_cpp.backend import LlamaCppBackend

        return LlamaCppBackend().refuse(target, plan)

    def load(self, request: LoadRequest) -> Session:
        """Start the server, or find the running one; see ``opening``."""
        from polydraft_llama_cpp.server.opening import open_session

        return open_session(request, self.capabilities())
