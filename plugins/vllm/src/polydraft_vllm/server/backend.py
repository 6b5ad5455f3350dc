"""The backend ``vllm-server``: a client of a running server, or of one that it starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from polydraft import reasons
from polydraft.checkpoints.fetch import fetch
from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    Exclusion,
    LoadRequest,
    ModelSource,
    RunningInfo,
    ServerCommand,
    SpeculationPlan,
)
from polydraft.errors import InvalidRequestError

from polydraft_vllm.backend import SAMPLING, VllmBackend
from polydraft_vllm.exclusions import server_exclusions
from polydraft_vllm.loading import check_request
from polydraft_vllm.options import VllmOptions, VllmServerOptions
from polydraft_vllm.plugin import DRAFTER_KINDS
from polydraft_vllm.server.client import ServerClient, api_key
from polydraft_vllm.server.command import dtype_of, server_command
from polydraft_vllm.server.inspection import inspect
from polydraft_vllm.server.process import LOOPBACK, ServerProcess, check_port, free_port
from polydraft_vllm.server.session import VllmServerSession
from polydraft_vllm.tokenizer import TOKENIZER_PATTERNS, load_tokenizer
from polydraft_vllm.versions import installed_vllm

if TYPE_CHECKING:
    from polydraft._session import Session

    from polydraft_vllm.server.inspection import Abilities

__all__ = ["VllmServerBackend"]

_CLIENT_ONLY = frozenset(
    {"url", "served_model_name", "api_key_variable", "port", "start_timeout", "connect_timeout", "read_timeout"}
    | {"connect_retries"}
)


class VllmServerBackend(Backend):
    """Speaks to vLLM's OpenAI-compatible server."""

    options = VllmServerOptions

    def capabilities(self) -> Capabilities:
        """Those of the engine in process."""
        return Capabilities(
            drafter_kinds=DRAFTER_KINDS, sampling=SAMPLING, concurrent_calls=True, max_speculative_tokens=16
        )

    def diagnose(self) -> Diagnosis:
        """Usable everywhere with a ``url``; to start a server, vLLM must be installed. Never chosen by ``auto``."""
        if installed_vllm() is not None:
            return VllmBackend().diagnose().model_copy(update={"rank": 5})
        return Diagnosis(
            usable=True,
            devices=(DeviceRecord(name="cpu", description="the server's"),),
            notes=("vLLM is not installed here: give engine_options={'url': ...}.",),
            rank=0,
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """As in process."""
        return VllmBackend().refuse(target, plan)

    def server_command(self, request: LoadRequest, *, host: str, port: int) -> ServerCommand:
        """See ``server.command``."""
        return server_command(request, _engine_options(request.engine_options), host=host, port=port)

    def load(self, request: LoadRequest) -> Session:
        """Connect, starting a server before if no ``url`` is given."""
        options: VllmServerOptions = request.engine_options
        check_request(request)
        if options.url is not None:
            given = options.model_fields_set - _CLIENT_ONLY | set(options.further)
            if given:
                raise InvalidRequestError(
                    f"With url the server is already running, and {', '.join(sorted(given))} cannot be set.",
                    "Leave it out, or give it to the server's own command.",
                )
            return self._connect(request, options, options.url, None)
        port = options.port or free_port()
        check_port(LOOPBACK, port)
        key = api_key(options.api_key_variable)
        command = self.server_command(request, host=LOOPBACK, port=port)
        dtype = dtype_of(request)
        process = ServerProcess(command, port, request.target.id, key)
        try:
            process.wait_until_ready(options.start_timeout)
            return self._connect(request, options, process.url, process, dtype)
        except BaseException:
            process.stop()
            raise

    def _connect(
        self,
        request: LoadRequest,
        options: VllmServerOptions,
        url: str,
        process: ServerProcess | None,
        dtype: tuple[str, str] = ("the server's", ""),
    ) -> Session:
        folder = fetch(request.target, request.hub, patterns=TOKENIZER_PATTERNS)
        tokenizer = load_tokenizer(folder, request)
        client = ServerClient(url, options, own=process is not None)
        try:
            name = options.served_model_name if process is None else request.target.id
            abilities = inspect(client, request, tokenizer, name)
            running = _running(request, abilities, client.url, dtype, own=process is not None)
        except BaseException:
            client.close()
            raise
        return VllmServerSession(client, process, abilities, tokenizer, running, self.capabilities())

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """See ``exclusions``."""
        return server_exclusions()


def _engine_options(options: VllmServerOptions) -> VllmOptions:
    """The engine's part of the options."""
    return VllmOptions(**{name: getattr(options, name) for name in VllmOptions.model_fields}, **options.further)


def _running(request: LoadRequest, abilities: Abilities, url: str, dtype: tuple[str, str], *, own: bool) -> RunningInfo:
    plan = request.plan
    notes = [f"Server: {url}", *([dtype[1]] if dtype[1] else [])]
    if not own and abilities.model != request.target.id:
        notes.append(f"The server calls the target {abilities.model} (from {abilities.root}).")
    method, k, off = plan.kind, plan.num_speculative_tokens, plan.off
    if not abilities.speculates:
        if method is not None:
            says = (
                "runs without speculation" if abilities.speculates is False else "does not tell whether it speculates"
            )
            off = reasons.by_engine(f"The vLLM server at {url} {says}.")
        method, k = None, 0
    elif not own:
        notes.append("The server does not say which drafter it uses; named is the one that belongs to the target.")
        if abilities.num_speculative_tokens is None:
            notes.append(f"The server does not say its num_speculative_tokens; named is {k}, as asked for here.")
        k = abilities.num_speculative_tokens or k
        if method is None:
            off = reasons.by_caller()
    context = abilities.context_length
    return RunningInfo(
        backend="vllm-server",
        engine="vllm",
        engine_version=abilities.version,
        target=request.target.id,
        drafter=plan.drafter.id if plan.drafter is not None and method is not None else None,
        method=method,
        num_speculative_tokens=k if method is not None else 0,
        dtype=dtype[0],
        device=request.device if own and request.device != "auto" else "the server's",
        context_length=min(context, request.context_length or context),
        concurrency="concurrent",
        speculation_off=off,
        notes=tuple(notes),
    )
