"""The backend ``llama-server``."""

from __future__ import annotations

import os
from collections.abc import Mapping

from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    LoadRequest,
    ModelSource,
    ServerCommand,
    SpeculationPlan,
    WholeEngine,
)
from polydraft.errors import BackendUnavailableError

from polydraft_llama_cpp.server import program as programs
from polydraft_llama_cpp.server.options import URL_VARIABLE, LlamaServerOptions

__all__ = ["LlamaServerBackend"]


class LlamaServerBackend(Backend):
    """Starts the user's llama-server, or uses one that runs already."""

    options = LlamaServerOptions

    def capabilities(self) -> Capabilities:
        """What its HTTP interface offers. It reports no log-probabilities of drafted tokens: they are not claimed."""
        return Capabilities(
            drafter_kinds=frozenset({"mtp", "draft-model"}),
            sampling=frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "guided"}),
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Find the program, and ask it for its version. With a ``url`` the backend is usable without a program."""
        if os.environ.get(URL_VARIABLE):
            return Diagnosis(usable=True, notes=(f"The server that {URL_VARIABLE} names.",), rank=20, depends_on=())
        try:
            path = programs.find()
            found = programs.program(path) if path else None
        except BackendUnavailableError as error:
            return Diagnosis(usable=False, reason=error.message, remedy=error.hint)
        if found is None:
            return Diagnosis(
                usable=True,
                notes=(f"{programs.NOT_FOUND} {programs.HOW_TO_FIND}",),
                rank=0,
                depends_on=programs.looked_at(None),
            )
        return Diagnosis(
            usable=True,
            engine_version=found.version,
            devices=tuple(DeviceRecord(name=name) for name in ("cpu", *found.devices)),
            notes=(found.path,),
            rank=20,
            depends_on=programs.looked_at(found.path),
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why a file cannot be loaded, as for the backend in this process."""
        from polydraft_gguf.files import refusal

        return refusal(target, plan)

    def build(self, request: LoadRequest) -> Mapping[str, str] | None:
        """The program with its version and its libraries, and the plugin's code; None for a server at a ``url``."""
        options: LlamaServerOptions = request.engine_options
        path = None if options.url else programs.find()
        if path is None:
            return None
        from polydraft_gguf.files import code

        return {**programs.program(path).build, **code()}

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command of llama-server; it asks for the API key that the options name, if they name one."""
        from polydraft_llama_cpp.server.loading import server_command

        return server_command(request, host=host, port=port)

    def load_engine(self, request: LoadRequest) -> WholeEngine:
        """Connect to the server; start it first if no ``url`` is given."""
        from polydraft_llama_cpp.server.loading import load_pair

        return load_pair(request)
