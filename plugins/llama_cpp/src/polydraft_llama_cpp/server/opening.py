"""From a load request to a session: files checked, the command line, the server, and a look whether it drafts."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from polydraft.contract import Capabilities, LoadRequest, RunningInfo
from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    SpeculationUnavailableError,
    UnsupportedError,
)

from polydraft_llama_cpp.devices import check_layers, usual_threads
from polydraft_llama_cpp.files import GgufFile, fetch_pair
from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.server import program as programs
from polydraft_llama_cpp.server.backend import LlamaServerOptions
from polydraft_llama_cpp.server.client import Client
from polydraft_llama_cpp.server.process import ServerProcess
from polydraft_llama_cpp.server.session import LlamaServerSession, drafts_in

__all__ = ["open_session"]

_USUAL_CONTEXT = 8192


def open_session(request: LoadRequest, capabilities: Capabilities) -> LlamaServerSession:
    """Load target and drafter in a server.

    Raises:
        BackendUnavailableError: There is no llama-server.
        SpeculationUnavailableError: It cannot run the drafter, or loads it and drafts nothing.
        PairMismatchError: The pair does not fit.
        ModelFormatError: A file is damaged, or the server does not take it.
        ContextLengthError: The context is longer than the model's.
        DeviceError: The program does not see the device.
        InvalidRequestError: An option does not fit the others.
    """
    place = programs.find()
    if place is None:
        raise BackendUnavailableError("No llama-server was found.", f"Set {programs.VARIABLE} to its path.")
    options: LlamaServerOptions = request.engine_options or LlamaServerOptions()
    kind, k = request.plan.kind, request.plan.num_speculative_tokens
    if kind is not None and options.n_batch < k + 1:
        raise InvalidRequestError(
            f"n_batch is {options.n_batch}, and a step verifies {k + 1} tokens.", f"Give at least n_batch={k + 1}."
        )
    target, drafter = fetch_pair(request)
    own = int(target.header.of_architecture("context_length") or _USUAL_CONTEXT)
    length = request.context_length or min(own, _USUAL_CONTEXT)
    if length > own:
        raise ContextLengthError(
            f"context_length is {length}, and {request.target.id} was made for {own} tokens.", f"Give at most {own}."
        )
    with ExitStack() as undo:
        vocabulary = Model.vocabulary(target.path, request.target.id)
        undo.callback(vocabulary.free)
        owned: list[ServerProcess] = []
        plain = None
        if programs.is_url(place):
            client = Client(place, options.api_key)
            properties = _properties(client)
            length = min(length, int(properties["default_generation_settings"]["n_ctx"]))
            version = str(properties.get("build_info", "unknown"))
            device = "the server's"
            _check_vocabulary(client, vocabulary)
        else:
            found = programs.program(place)
            version = found.version
            if kind is not None:
                found.check_drafter(kind)
            own_device = found.device(request.device)
            used = [name for name, own in found.devices.items() if own_device in {None, own}]
            device = ",".join(used) or "cpu"
            command = _command(found, target, length, request, options)
            if kind is not None:
                plain = partial(ServerProcess, command, options.start_seconds)
                command = [*command, *_drafting(request, drafter, options, target, own_device)]
            process = ServerProcess(command, options.start_seconds)
            undo.callback(process.close)
            owned.append(process)
            client = process.client
        notes = [request.plan.note] if request.plan.note else []
        if kind is not None:
            if not drafts_in(client, _sample(vocabulary)):
                raise SpeculationUnavailableError(
                    "llama-server has loaded the drafter, but drafts nothing.",
                    "A running server needs --spec-type draft-mtp (or draft-simple) beside --spec-draft-model.",
                )
            if plain is not None:
                notes.append("speculate='off' starts a second llama-server: one cannot turn drafts off for a request.")
        running = RunningInfo(
            backend="llama-server",
            engine="llama-server",
            engine_version=version,
            target=request.target.id,
            drafter=request.plan.drafter.id if request.plan.drafter else None,
            method=kind,
            num_speculative_tokens=request.plan.num_speculative_tokens if kind else 0,
            dtype=target.dtype,
            device=device,
            context_length=length,
            concurrency="serial",
            speculation_off=request.plan.off,
            notes=tuple(notes),
        )
        session = LlamaServerSession(vocabulary, running, capabilities, client, plain, owned)
        undo.pop_all()
    return session


def _properties(client: Client) -> dict[str, Any]:
    """What a running server says of itself."""
    try:
        found: dict[str, Any] = client.get("/props")
    except EngineError as error:
        raise BackendUnavailableError(
            f"No llama-server answers at {client.url}: {error.message}", f"Start it, or set {programs.VARIABLE} anew."
        ) from error
    return found


def _command(
    found: programs.Program, target: GgufFile, length: int, request: LoadRequest, options: LlamaServerOptions
) -> list[str]:
    k = request.plan.num_speculative_tokens
    types, device = _cache_types(target, options), found.device(request.device)
    # Never the server's own "auto": it may choose otherwise for the drafter, whose drafts are then hardly accepted.
    on_gpu = bool(found.devices) if device is None else device != "none"
    check_layers("n_gpu_layers", options.n_gpu_layers, on_gpu=on_gpu)
    wanted = on_gpu or types[1] not in {"f32", "f16", "bf16"}
    flash = ("on" if wanted else "off") if options.flash_attn == "auto" else options.flash_attn
    command = [found.path, "--model", str(target.path), "--ctx-size", str(length + k + 2), "--parallel", "1"]
    command += ["--batch-size", str(options.n_batch), "--ubatch-size", str(options.n_batch)]
    command += ["--cache-type-k", types[0], "--cache-type-v", types[1], "--flash-attn", flash]
    for flag in ("--no-ui", "--no-webui"):
        if found.has(flag):
            command.append(flag)
            break
    if device is not None:
        command += ["--device", device]
    # Said always: more threads than cores that are free make the server wait at every operation.
    command += ["--threads", str(options.threads or usual_threads())]
    if options.n_gpu_layers is not None:
        command += ["--n-gpu-layers", "999" if options.n_gpu_layers < 0 else str(options.n_gpu_layers)]
    return [*command, *options.extra_args]


def _drafting(
    request: LoadRequest,
    drafter: GgufFile | None,
    options: LlamaServerOptions,
    target: GgufFile,
    device: str | None,
) -> list[str]:
    assert drafter is not None
    assert request.plan.kind is not None
    types = _cache_types(target, options)
    return [
        *("--spec-draft-model", str(drafter.path)),
        *("--spec-type", programs.SPEC_TYPES[request.plan.kind]),
        *("--spec-draft-n-max", str(request.plan.num_speculative_tokens)),
        *("--spec-draft-type-k", types[0], "--spec-draft-type-v", types[1]),
        *(("--spec-draft-device", device) if device is not None else ()),
    ]


def _cache_types(target: GgufFile, options: LlamaServerOptions) -> tuple[str, str]:
    usual = "f32" if target.weights == "f32" else "f16"
    type_k, type_v = (usual if given == "auto" else given for given in (options.type_k, options.type_v))
    return type_k, type_v


def _check_vocabulary(client: Client, vocabulary: Model) -> None:
    """A running server must hold the target whose file was given."""
    from polydraft_llama_cpp.tokenizer import GgufTokenizer

    text = "def main():\n    return 'naïve', 12345 # ☃"
    found = client.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
    if found != GgufTokenizer(vocabulary).encode(text):
        raise UnsupportedError(
            f"The server at {client.url} has other tokens than {vocabulary.name}.",
            "Load the file that the server runs.",
        )


def _sample(vocabulary: Model) -> list[int]:
    from polydraft_llama_cpp.tokenizer import GgufTokenizer

    tokenizer = GgufTokenizer(vocabulary)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *tokenizer.encode("def add(a, b):\n    return a + b\n\n\ndef ")]
