"""From a load request to a running server in this process."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from importlib.metadata import version

from polydraft.contract import LoadRequest, RunningInfo, ServerCommand
from polydraft.engine_parts import context_length
from polydraft.errors import InvalidRequestError, OutOfMemoryError, SpeculationUnavailableError, UnsupportedError
from polydraft.hardware import free_memory
from polydraft_gguf.files import GgufFile, fetch_pair
from polydraft_gguf.resources import (
    check_layers,
    check_prefix_cache,
    context_bytes,
    default_threads,
    matmul_precision,
    swa_note,
)
from polydraft_gguf.serving.engine import LlamaServerEngine
from polydraft_gguf.serving.trial import drafts_as_planned

from polydraft_xllamacpp.in_process import InProcessServer, command
from polydraft_xllamacpp.options import XllamacppOptions
from polydraft_xllamacpp.settings import ServerSettings, gpus
from polydraft_xllamacpp.tokenizer import ServerTokenizer

__all__ = ["load_pair", "server_command"]

_DEFAULT_CONTEXT = 8192
_SLOTS = 4
_SHARE = 0.5
"""Of the free memory, what the caches may take where the caller did not say how many requests run at a time."""
_KINDS = {"mtp": "draft-mtp", "draft-model": "draft-simple"}
_PLAIN_NOTE = "Plain calls start a second server in this process: one cannot turn drafts off for a request."
_TEXT = "def main():\n    return 'naïve', 12345 # ☃"
"""Indentation, digits, an accent, a rare symbol: where vocabularies differ."""


def load_pair(request: LoadRequest) -> LlamaServerEngine:
    """Start a server for the pair.

    Raises:
        PairMismatchError: Target and drafter do not fit together.
        ModelFormatError: A file is missing, damaged, or unknown to llama.cpp.
        DeviceError: The device does not exist.
        OutOfMemoryError: The caches do not fit into the free memory.
        ContextLengthError: The context is longer than the model's.
        InvalidRequestError: An option does not fit the others.
        SpeculationUnavailableError: The server has loaded the drafter, but drafts nothing.
        UnsupportedError: The vocabulary is of a kind that is not read here.
        NonFiniteLogitsError: The target computes NaN or infinite logits.
    """
    settings, target, length = _settings(request)
    with ExitStack() as undo:
        server = InProcessServer(settings, request.target.id)
        undo.callback(server.stop)
        tokenizer = ServerTokenizer(target.header, server.client, request.target.id)
        _check_vocabulary(tokenizer, request.target.id)
        if not drafts_as_planned(server.client, tokenizer, request.plan, target.dtype):
            raise SpeculationUnavailableError(
                "llama.cpp's server drafts nothing with this drafter.", "Use another drafter, or `drafter=None`."
            )
        speculates, device = request.plan.kind is not None, _device(settings)
        running = RunningInfo.of(
            request,
            engine="xllamacpp",
            engine_version=version("xllamacpp"),
            dtype=target.dtype,
            device=device,
            matmul_precision=matmul_precision(target.dtype, device),
            context_length=length,
            concurrency="concurrent",
            notes=[_PLAIN_NOTE if speculates else "", target.note, swa_note(settings.swa_full, target.header)],
        )
        start_plain = partial(InProcessServer, settings.plain(), request.target.id)
        undo.pop_all()
        return LlamaServerEngine(tokenizer, running, server, start_plain if speculates else None)


def server_command(request: LoadRequest, *, host: str, port: int) -> ServerCommand:
    """The command that serves the pair. Files are fetched, and converted where needed; nothing is started.

    Raises:
        PolydraftError: As ``load_pair`` before it starts the server.
    """
    from dataclasses import replace

    check_prefix_cache(request)
    settings, _, _ = _settings(request)
    return ServerCommand(arguments=tuple(command(replace(settings, host=host, port=port))))


def _settings(request: LoadRequest) -> tuple[ServerSettings, GgufFile, int]:
    """What the server runs, the target's file, and the tokens of a context."""
    import xllamacpp as engine

    options: XllamacppOptions = request.engine_options or XllamacppOptions()
    kind, k = request.plan.kind, request.plan.num_speculative_tokens
    on_gpu = request.device != "cpu" and (request.device != "auto" or bool(gpus(engine)))
    check_layers("n_gpu_layers", options.n_gpu_layers, on_gpu=on_gpu)
    if kind == "ngram" and "ngram_size" in options.model_fields_set and options.ngram_size > k:
        raise InvalidRequestError(
            f"ngram_size is {options.ngram_size}, and k {k}: with fewer tokens to draft than to look up, llama.cpp "
            "drafts none.",
            f"Give `num_speculative_tokens={options.ngram_size}`, or a smaller ngram_size.",
        )
    target, drafter = fetch_pair(request, on_cpu=not on_gpu)
    length = context_length(request, longest=target.header.of_architecture("context_length"), usual=_DEFAULT_CONTEXT)
    types = options.cache_types(target.weights)
    headers = [file.header for file in (target, drafter) if file is not None]
    flash_attn = options.uses_flash_attn(types[1], headers, on_gpu=on_gpu)
    # Drafts are stored before they are verified: room for a whole step at the end of each context.
    cells = length + k + 2
    needed = context_bytes(
        target.header, cells, options.n_batch, types, flash_attn=flash_attn, swa_full=options.swa_full
    )
    if drafter is not None and kind == "draft-model":
        needed += context_bytes(drafter.header, cells, options.n_batch, types, flash_attn=flash_attn, swa_full=True)
    slots = _slots(options, needed, on_gpu=on_gpu)
    options.check_batch(slots * (k + 1))
    return (
        ServerSettings(
            model=target.path,
            ctx_size=slots * cells,
            parallel=slots,
            batch_size=options.n_batch,
            cache_type_k=types[0],
            cache_type_v=types[1],
            flash_attn=flash_attn,
            threads=options.threads or default_threads(),
            device=request.device,
            n_gpu_layers=options.n_gpu_layers,
            swa_full=options.swa_full,
            mmap=options.mmap,
            spec_type="none" if kind is None else _KINDS.get(kind, f"ngram-{options.ngram_type}"),
            spec_draft_model=drafter.path if drafter else None,
            spec_draft_n_max=k if kind else 0,
            spec_ngram_size=max(1, min(options.ngram_size, k)),
        ),
        target,
        length,
    )


def _slots(options: XllamacppOptions, needed: int, *, on_gpu: bool) -> int:
    """Requests that run at a time: as asked for, else as many of four as there is memory for."""
    free = free_memory()
    asked = options.n_parallel or 1
    if not on_gpu and asked * needed > free:
        raise OutOfMemoryError(
            f"{asked} context{'s need' if asked > 1 else ' needs'} about {asked * needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of memory are free.",
            "Give a smaller `context_length`, or `engine_options={'n_parallel': 1}`.",
        )
    if options.n_parallel is not None or on_gpu:
        return options.n_parallel or _SLOTS
    return max(1, min(_SLOTS, int(_SHARE * free / max(needed, 1))))


def _check_vocabulary(tokenizer: ServerTokenizer, name: str) -> None:
    """Refuse a vocabulary whose tokens this plugin would show as other text than llama.cpp."""
    found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(_TEXT)))
    # Some tokenizers put a space before a text, or normalize it: then at least its letters come back.
    if _TEXT.encode() not in {found, found.removeprefix(b" ")}:
        raise UnsupportedError(
            f"The vocabulary of {name} is of a kind that polydraft-xllamacpp does not read: {_TEXT!r} comes back as "
            f"{found.decode('utf-8', 'replace')!r}.",
            "Use `backend='llama_cpp'`.",
        )


def _device(settings: ServerSettings) -> str:
    import xllamacpp as engine

    return settings.device if settings.device != "auto" else ",".join(gpus(engine)) or "cpu"
