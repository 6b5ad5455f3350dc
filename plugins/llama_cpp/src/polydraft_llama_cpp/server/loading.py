"""From a load request to a connected server: one that runs already, or one that is started here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from polydraft.checkpoints.special_tokens import gguf_special_tokens
from polydraft.contract import LoadRequest, RunningInfo, ServerCommand
from polydraft.engine_parts import context_length
from polydraft.engine_parts.server_options import THE_SERVERS
from polydraft.errors import (
    BackendUnavailableError,
    EngineError,
    InvalidRequestError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft_gguf.environment import needed_environment
from polydraft_gguf.files import GgufFile, fetch_pair
from polydraft_gguf.resources import check_layers, check_prefix_cache, default_threads, matmul_precision
from polydraft_gguf.serving.client import Client
from polydraft_gguf.serving.engine import LlamaServerEngine
from polydraft_gguf.serving.trial import drafts_as_planned

from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.server import program as programs
from polydraft_llama_cpp.server.options import URL_VARIABLE, LlamaServerOptions
from polydraft_llama_cpp.server.program import Program, Server
from polydraft_llama_cpp.tokenizer import GgufTokenizer

__all__ = ["load_pair", "server_command"]

_DEFAULT_CONTEXT = 8192
_PLAIN_NOTE = "`speculate='off'` starts a second llama-server: one cannot turn drafts off for a request."


class _Found(NamedTuple):
    """A server that is ready, and what it runs."""

    server: Server
    version: str
    device: str
    context_length: int | None
    """Tokens; None: as it was started here."""
    start_plain: Callable[[], Server] | None
    """Starts a second server, without the drafter; None if the server was not started by us."""


def load_pair(request: LoadRequest) -> LlamaServerEngine:
    """Connect to the server, or start one.

    Raises:
        BackendUnavailableError: There is no llama-server, or none at the url.
        SpeculationUnavailableError: It cannot run the drafter, or loads it and drafts nothing.
        PairMismatchError: The pair does not fit together.
        ModelFormatError: A file is damaged, or the server rejects it.
        ContextLengthError: The context is longer than the model's.
        DeviceError: The program does not see the device.
        InvalidRequestError: An option does not fit the others, or was given together with a url.
        UnsupportedError: The server at the url runs another model.
        NonFiniteLogitsError: The target computes NaN or infinite logits.
    """
    place = _place(request)
    target, drafter = fetch_pair(request, on_cpu=isinstance(place, Program) and not _on_gpu(place, request))
    length = context_length(request, longest=target.header.of_architecture("context_length"), usual=_DEFAULT_CONTEXT)
    with ExitStack() as undo:
        vocabulary = Model(target.path, request.target.id, vocab_only=True)
        undo.callback(vocabulary.free)
        tokenizer = GgufTokenizer(vocabulary, gguf_special_tokens(target.header))
        if isinstance(place, Program):
            found = _start(place, request, target, drafter, length)
        else:
            found = _connect(place, tokenizer, request.target.id)
        undo.callback(found.server.stop)
        if not drafts_as_planned(found.server.client, tokenizer, request.plan, target.dtype):
            raise SpeculationUnavailableError(
                "llama-server has loaded the drafter, but drafts nothing.",
                "A running server needs --spec-type draft-mtp (or draft-simple) in addition to --spec-draft-model.",
            )
        running = RunningInfo.of(
            request,
            engine="llama-server",
            engine_version=found.version,
            dtype=target.dtype,
            device=found.device,
            matmul_precision=matmul_precision(target.dtype, found.device),
            context_length=min(length, found.context_length or length),
            concurrency="serial",
            notes=[
                _PLAIN_NOTE if found.start_plain else "",
                "The server does not report `num_speculative_tokens`; "
                f"{request.plan.num_speculative_tokens} was asked for here."
                if isinstance(place, Client) and request.plan.kind is not None
                else "",
                target.note,
            ],
        )
        undo.pop_all()
        return LlamaServerEngine(tokenizer, running, found.server, found.start_plain, vocabulary.free)


def server_command(request: LoadRequest, *, host: str, port: int) -> ServerCommand:
    """The command that serves the pair. Files are fetched, and converted where needed; nothing is started.

    Raises:
        UnsupportedError: A ``url`` is set: that server runs already; or prompts were not to be reused.
        InvalidRequestError: An option for clients was given.
        PolydraftError: As ``load_pair`` before it starts the server.
    """
    request.engine_options.check_command()
    check_prefix_cache(request)
    place = _place(request)
    if not isinstance(place, Program):
        raise UnsupportedError(f"The server at {place.url} runs already.", f"Unset {URL_VARIABLE} to start another.")
    target, drafter = fetch_pair(request, on_cpu=not _on_gpu(place, request))
    length = context_length(request, longest=target.header.of_architecture("context_length"), usual=_DEFAULT_CONTEXT)
    command = _command(place, target, drafter, length, request)
    if drafter is not None:
        command = [*command, *_drafter_flags(place, target, drafter, request)]
    key = request.engine_options.key()
    return ServerCommand(
        arguments=(*command, "--host", host, "--port", str(port)),
        environment=needed_environment() | ({"LLAMA_API_KEY": key} if key else {}),
    )


def _place(request: LoadRequest) -> Program | Client:
    """The program that can run the pair, or the client of the server that runs already."""
    options: LlamaServerOptions = request.engine_options
    if options.url is not None:
        if given := options.given_to_start():
            raise InvalidRequestError(
                f"{', '.join(given)} cannot be set: with url, the server runs already.",
                "Leave it out, or give it to the command that starts the server.",
            )
        return programs.client(options.url, options.key(), options)
    path = programs.find()
    if path is None:
        raise BackendUnavailableError(programs.NOT_FOUND, programs.HOW_TO_FIND)
    found, plan = programs.program(path), request.plan
    if plan.kind is not None:
        options.check_batch(plan.num_speculative_tokens + 1)
        found.check_drafter(plan.kind)
    return found


def _start(program: Program, request: LoadRequest, target: GgufFile, drafter: GgufFile | None, length: int) -> _Found:
    """Start a server for the pair."""
    options: LlamaServerOptions = request.engine_options
    start_plain = None
    command = _command(program, target, drafter, length, request)
    if drafter is not None:
        start_plain = partial(programs.start, command, options)
        command = [*command, *_drafter_flags(program, target, drafter, request)]
    own = program.device(request.device)
    used = [name for name, known in program.devices.items() if own in {None, known}]
    server = programs.start(command, options)
    return _Found(server, program.version, ",".join(used) or "cpu", None, start_plain)


def _connect(client: Client, tokenizer: GgufTokenizer, target: str) -> _Found:
    """Ask a running server what it runs."""
    try:
        found = client.json("/props")
    except EngineError as error:
        raise BackendUnavailableError(
            f"No llama-server answers at {client.url}: {error.message}", "Start it, or correct the url."
        ) from error
    # Indentation, digits, an accent, a rare symbol: where vocabularies differ.
    text = "def main():\n    return 'naïve', 12345 # ☃"
    tokenized = client.json("/tokenize", {"content": text, "add_special": False, "parse_special": True})
    try:
        token_ids, longest = tokenized["tokens"], int(found["default_generation_settings"]["n_ctx"])
        version = client.shown(str(found.get("build_info", "unknown")))
        if longest < 1:
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # JSON of another shape
        raise BackendUnavailableError(
            f"The server at {client.url} is not a llama-server.", "Give the url of one."
        ) from error
    if token_ids != tokenizer.encode(text):
        raise UnsupportedError(
            f"The tokens of the server at {client.url} are not those of {target}.",
            "Load the file that the server runs.",
        )
    return _Found(Server(client), version, THE_SERVERS, longest, None)


def _on_gpu(program: Program, request: LoadRequest) -> bool:
    device = program.device(request.device)
    return bool(program.devices) if device is None else device != "none"


def _command(
    program: Program, target: GgufFile, drafter: GgufFile | None, length: int, request: LoadRequest
) -> list[str]:
    """The command of a server without its drafter, host and port."""
    options: LlamaServerOptions = request.engine_options
    types, device = options.cache_types(target.weights), program.device(request.device)
    on_gpu = _on_gpu(program, request)
    check_layers("n_gpu_layers", options.n_gpu_layers, on_gpu=on_gpu)
    headers = [file.header for file in (target, drafter) if file is not None]
    # As with the drafter: plain decoding and verification are to be computed alike.
    flash_attn = "on" if options.uses_flash_attn(types[1], headers, on_gpu=on_gpu) else "off"
    # Drafts are stored before they are verified: room for a whole step at the end of the context.
    cells = length + request.plan.num_speculative_tokens + 2
    command = [program.path, "--model", str(target.path), "--ctx-size", str(cells), "--parallel", "1"]
    command += ["--batch-size", str(options.n_batch), "--ubatch-size", str(options.n_batch)]
    command += ["--cache-type-k", types[0], "--cache-type-v", types[1], "--flash-attn", flash_attn]
    command += [flag for flag in ("--no-ui", "--no-webui") if program.has(flag)][:1]
    if device is not None:
        command += ["--device", device]
    # Always given: with more threads than free cores the server waits at every operation.
    command += ["--threads", str(options.threads or default_threads())]
    if options.n_gpu_layers is not None:
        command += ["--n-gpu-layers", "999" if options.n_gpu_layers < 0 else str(options.n_gpu_layers)]
    return [*command, *options.extra_args]


def _drafter_flags(program: Program, target: GgufFile, drafter: GgufFile, request: LoadRequest) -> list[str]:
    options: LlamaServerOptions = request.engine_options
    types, device = options.cache_types(target.weights), program.device(request.device)
    assert request.plan.kind is not None
    flags = ["--spec-draft-model", str(drafter.path), "--spec-type", programs.SPEC_TYPES[request.plan.kind]]
    flags += ["--spec-draft-n-max", str(request.plan.num_speculative_tokens)]
    flags += ["--spec-draft-type-k", types[0], "--spec-draft-type-v", types[1]]
    return flags if device is None else [*flags, "--spec-draft-device", device]
