"""From a load request to a connected server: one that runs already, or one that is started here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from polydraft import reasons
from polydraft.checkpoints.fetch import fetch
from polydraft.contract import RunningInfo
from polydraft.engine_parts.server_options import THE_SERVERS
from polydraft.engine_parts.serving import LOOPBACK, ServerProcess, check_port, free_port

from polydraft_vllm.checks import check_request
from polydraft_vllm.environment import server_environment
from polydraft_vllm.resources import matmul_precision
from polydraft_vllm.server.client import ServerClient
from polydraft_vllm.server.command import server_command
from polydraft_vllm.server.engine import VllmServerEngine
from polydraft_vllm.server.inspection import inspect
from polydraft_vllm.start_errors import server_start_error
from polydraft_vllm.tokenizer import TOKENIZER_PATTERNS, load_tokenizer

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest

    from polydraft_vllm.server.command import PreparedCommand
    from polydraft_vllm.server.inspection import Abilities
    from polydraft_vllm.server.options import VllmServerOptions

__all__ = ["load_pair"]


def load_pair(request: LoadRequest) -> VllmServerEngine:
    """Connect to the server, or start one. Errors as for ``Backend.load_engine``.

    Raises:
        BackendUnavailableError: There is no vLLM server at the url, or it refuses the key.
        ModelNotFoundError: The server serves another model.
        InvalidRequestError: The dtype is unknown.
    """
    options: VllmServerOptions = request.engine_options
    check_request(request)
    if options.url is not None:
        return _connect(request, options.url)
    process, command = _start(request, options)
    try:
        return _connect(request, process.url, process, command)
    except BaseException:
        process.stop()
        raise


def _start(request: LoadRequest, options: VllmServerOptions) -> tuple[ServerProcess, PreparedCommand]:
    """Start a server on the loopback interface and wait until it is ready."""
    port = options.port or free_port()
    check_port(LOOPBACK, port)
    prepared = server_command(request, host=LOOPBACK, port=port)
    target = request.target.id
    process = ServerProcess(
        prepared.command.arguments,
        name=f"The vLLM server of {target}",
        port=port,
        environment=prepared.command.environment,
    )
    process.wait_until_ready(options.start_timeout, failure=lambda code, log: server_start_error(target, log))
    return process, prepared


def _connect(
    request: LoadRequest, url: str, process: ServerProcess | None = None, command: PreparedCommand | None = None
) -> VllmServerEngine:
    """Connect, and find out what the server can do; ``process`` and ``command`` are those of a server started here."""
    options: VllmServerOptions = request.engine_options
    folder = fetch(request.target, request.hub, patterns=TOKENIZER_PATTERNS)
    tokenizer = load_tokenizer(folder, request)
    client = ServerClient(url, options, own=process is not None)
    name = options.served_model_name if process is None else request.target.id
    abilities = inspect(client, request, tokenizer, name, command.dtype if command else "")
    running = _running(request, abilities, client.url, command)
    reuses = request.prefix_cache_bytes != 0
    return VllmServerEngine(client, process, abilities, tokenizer, running, reuses=reuses)


def _running(request: LoadRequest, abilities: Abilities, url: str, command: PreparedCommand | None) -> RunningInfo:
    """What runs. A server that was started elsewhere (``command`` is None) may not run what was asked for."""
    method, k, off = request.plan.kind, request.plan.num_speculative_tokens, request.plan.off
    notes = [f"Server: {url}"]
    if command is not None:
        notes.append(command.note)
    elif abilities.model != request.target.id:
        notes.append(f"The server calls the target {abilities.model} (from {abilities.root}).")
    if not abilities.speculates:
        if method is not None:
            found = "runs without speculation" if abilities.speculates is False else "does not report speculation"
            off = reasons.by_engine(f"The vLLM server at {url} {found}.")
        method = None
    elif command is None:
        notes.append("The server does not report its drafter; the one named here belongs to the target.")
        if abilities.num_speculative_tokens is None:
            notes.append(f"The server does not report `num_speculative_tokens`; {k} was asked for here.")
        elif abilities.num_speculative_tokens != k and request.plan.k_chosen_by == "caller" and method is not None:
            notes.append(
                f"The server drafts {abilities.num_speculative_tokens} tokens a round; {k} were asked for here."
            )
        k = abilities.num_speculative_tokens or k
        if method is None:
            off = reasons.by_caller()
    dtype = command.dtype if command else THE_SERVERS
    device = request.device if command and request.device != "auto" else THE_SERVERS
    running = RunningInfo.of(
        request,
        engine="vllm",
        engine_version=abilities.version,
        dtype=dtype,
        matmul_precision=matmul_precision(dtype, device, {**os.environ, **server_environment(cpu=False)}),
        device=device,
        context_length=min(abilities.context_length, request.context_length or abilities.context_length),
        concurrency="concurrent",
        notes=notes,
    )
    return running.model_copy(
        update={
            "method": method,
            "drafter": running.drafter if method else None,
            "num_speculative_tokens": k if method else 0,
            "speculation_off": off,
        }
    )
