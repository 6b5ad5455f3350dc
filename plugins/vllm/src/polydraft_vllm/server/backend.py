"""The backend ``vllm-server``: a client of a running server, or of one that the session starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract import DeviceRecord, Diagnosis, LoadRequest
from polydraft.errors import UnsupportedError

from polydraft_vllm.backend import VllmBackend
from polydraft_vllm.server.options import URL_VARIABLE, VllmServerOptions
from polydraft_vllm.versions import installed_vllm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polydraft.contract import ServerCommand, WholeEngine

__all__ = ["VllmServerBackend"]


class VllmServerBackend(VllmBackend):
    """The same engine behind vLLM's OpenAI-compatible server."""

    options = VllmServerOptions

    def diagnose(self) -> Diagnosis:
        """Usable everywhere with a ``url``; to start a server, vLLM must be installed. ``auto`` never chooses it."""
        if installed_vllm() is not None:
            return super().diagnose().model_copy(update={"rank": 5})
        return Diagnosis(
            usable=True,
            devices=(DeviceRecord(name="cpu", description="the server's"),),
            notes=(f"vLLM is not installed here: give `engine_options={{'url': ...}}`, or set {URL_VARIABLE}.",),
            rank=0,
            depends_on=(),
        )

    def build(self, request: LoadRequest) -> Mapping[str, str] | None:
        """That of the installed vLLM, which the session starts; None for a server at a ``url``."""
        options: VllmServerOptions = request.engine_options
        return super().build(request) if options.url is None else None

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """The command of vLLM's own server, which has no use for options of clients."""
        options: VllmServerOptions = request.engine_options
        if options.url is not None:
            raise UnsupportedError(
                f"The server at {options.url} runs already.", f"Unset {URL_VARIABLE} to start another."
            )
        options.check_command("port", "connect_retries")
        return super().server_command(request, host=host, port=port)

    def load_engine(self, request: LoadRequest) -> WholeEngine:
        """Connect to the server; start it first if no ``url`` is given."""
        from polydraft_vllm.server.loading import load_pair

        return load_pair(request)
