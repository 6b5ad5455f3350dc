"""From a load request to a loaded pair: files, device, memory, weights, contexts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from polydraft.checkpoints.special_tokens import gguf_special_tokens
from polydraft.contract import LoadRequest, RunningInfo
from polydraft.engine_parts import context_length
from polydraft.engine_parts.memory import MemoryEstimate
from polydraft.errors import InvalidRequestError, OutOfMemoryError, SpeculationUnavailableError, UnsupportedError
from polydraft.hardware import free_memory
from polydraft_gguf.files import GgufFile, fetch_pair
from polydraft_gguf.resources import check_layers, context_bytes, default_threads, matmul_precision, swa_note

from polydraft_llama_cpp.bindings import engine_name, missing_for_mtp, version_of
from polydraft_llama_cpp.context import Context, ContextSettings
from polydraft_llama_cpp.drafters.mtp import MtpDrafter
from polydraft_llama_cpp.engine import LlamaCppEngine, step_rows
from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.options import LlamaCppOptions
from polydraft_llama_cpp.resources import Device, devices, find_device
from polydraft_llama_cpp.tokenizer import GgufTokenizer

__all__ = ["load_pair"]

_MULTIPLE = 256
"""llama.cpp rounds the length of its caches up to a multiple of this many tokens."""
_SHARE = 0.5
"""Of the free memory, what a context may take if the caller did not give its length."""


def load_pair(request: LoadRequest) -> LlamaCppEngine:
    """Load target and drafter.

    Raises:
        PairMismatchError: They do not fit together.
        ModelFormatError: A file is missing, damaged, or unknown to llama.cpp.
        DeviceError: The device does not exist.
        OutOfMemoryError: Weights or context do not fit into the free memory.
        ContextLengthError: The context is longer than the model's.
        InvalidRequestError: An option does not fit the others.
        SpeculationUnavailableError: The installed version does not have MTP, or was not tested with it; or the model
            is recurrent.
        UnsupportedError: Bitwise steps on a device where they have not been measured; a model that does not generate.
    """
    options: LlamaCppOptions = request.engine_options or LlamaCppOptions()
    request = _with_n_ctx(request, options)
    is_mtp = request.plan.kind == "mtp"
    options.check_batch(step_rows(request))
    if request.exactness == "bitwise" and not options.swa_full and "swa_full" in options.model_fields_set:
        raise InvalidRequestError(
            "swa_full is False, and `exactness='bitwise'` needs caches of full length.", "Leave one of them out."
        )
    if is_mtp and (reason := missing_for_mtp(allow_untested=options.allow_untested)):
        raise SpeculationUnavailableError(
            reason,
            "Install a tested version, give `engine_options={'allow_untested': True}`, or use `drafter='ngram'`.",
        )
    device = find_device(request.device)
    draft_device = find_device(options.device_draft) if options.device_draft else device
    on_gpu = _on_gpu(device)
    check_layers("n_gpu_layers", options.n_gpu_layers, on_gpu=on_gpu)
    check_layers("n_gpu_layers_draft", options.n_gpu_layers_draft, on_gpu=_on_gpu(draft_device))
    if request.exactness == "bitwise" and on_gpu:
        raise UnsupportedError(
            "`exactness='bitwise'` has been measured with llama.cpp on the CPU only.", "Use `device='cpu'`."
        )
    target, drafter = fetch_pair(request, on_cpu=not on_gpu)
    settings, length, note = _settings(request, options, target, drafter, on_gpu=on_gpu)
    with ExitStack() as undo:
        context = Context(_model(target, device, options.n_gpu_layers, request, undo), settings, keeps_hidden=is_mtp)
        undo.callback(context.free)
        side: MtpDrafter | Context | None = None
        if drafter is not None:
            layers = options.n_gpu_layers if options.n_gpu_layers_draft is None else options.n_gpu_layers_draft
            weights = _model(drafter, draft_device, layers, request, undo)
            # A draft model decodes its drafts one by one: in a sliding window's own cache, a later one would overwrite
            # keys that a rollback needs.
            side = (
                MtpDrafter(weights, context, settings)
                if is_mtp
                else Context(weights, replace(settings, swa_full=True), vocab_size=context.model.vocab_size)
            )
            undo.callback(side.free)
        where = device.name if device else ",".join(found.name for found in devices() if not found.is_cpu)
        running = RunningInfo.of(
            request,
            engine=engine_name(),
            engine_version=version_of(),
            dtype=target.dtype,
            device=where,
            matmul_precision=matmul_precision(target.dtype, where),
            context_length=length,
            concurrency="serial",
            notes=[note, target.note, swa_note(options.swa_full, target.header)],
        )
        tokenizer = GgufTokenizer(context.model, gguf_special_tokens(target.header))
        return LlamaCppEngine(request, running, context, side, tokenizer, undo.pop_all())


def _with_n_ctx(request: LoadRequest, options: LlamaCppOptions) -> LoadRequest:
    """The request, with ``context_length`` as the option ``n_ctx`` gives it."""
    if options.n_ctx is None:
        return request
    if request.context_length not in {None, options.n_ctx}:
        raise InvalidRequestError(
            f"`context_length` is {request.context_length}, and `n_ctx` {options.n_ctx}.",
            "Give one of them: they mean the same.",
        )
    return request.model_copy(update={"context_length": options.n_ctx})


def _on_gpu(device: Device | None) -> bool:
    return device is None or not device.is_cpu


def _model(file: GgufFile, device: Device | None, layers: int | None, request: LoadRequest, undo: ExitStack) -> Model:
    """Load a file's weights; ``undo`` frees them."""
    options: LlamaCppOptions = request.engine_options or LlamaCppOptions()
    model = Model(
        file.path,
        file.source.id,
        device=device,
        n_gpu_layers=(-1 if layers is None else layers) if _on_gpu(device) else 0,
        mmap=options.mmap,
        mlock=options.mlock,
    )
    undo.callback(model.free)
    if model.is_recurrent and request.plan.kind is not None:
        raise SpeculationUnavailableError(
            f"{model.name} has recurrent layers, and llama.cpp cannot restore their state when a draft is rejected.",
            "Use `drafter=None`." if model.name == request.target.id else "Use another drafter, or `drafter=None`.",
        )
    return model


def _settings(
    request: LoadRequest, options: LlamaCppOptions, target: GgufFile, drafter: GgufFile | None, *, on_gpu: bool
) -> tuple[ContextSettings, int, str]:
    """The contexts' settings, the tokens that a sequence may hold, and a note if these are fewer than the model's."""
    rows = step_rows(request)
    types = options.cache_types(target.weights)
    headers = [file.header for file in (target, drafter) if file is not None]
    flash_attn = options.uses_flash_attn(types[1], headers, on_gpu=on_gpu)
    swa_full = options.swa_full or request.exactness == "bitwise"

    def needed(length: int) -> int:
        total = context_bytes(target.header, length, options.n_batch, types, flash_attn=flash_attn, swa_full=swa_full)
        if drafter is not None and request.plan.kind == "draft-model":
            total += context_bytes(drafter.header, length, options.n_batch, types, flash_attn=flash_attn, swa_full=True)
        return total

    # Mapped weights can be dropped from memory and read again; others stay.
    stay = not on_gpu and (options.mlock or not options.mmap)
    weights = sum(file.bytes for file in (target, drafter) if file is not None)
    length, note = _context_length(request, target, needed, _free_after(weights if stay else 0))
    estimate = MemoryEstimate(weights=weights, kv=needed(length), tokens=length)
    estimate.announce(request, "the GPU" if on_gpu else "cpu", None if on_gpu else free_memory())
    threads = options.threads or default_threads()
    settings = ContextSettings(
        length=_rounded(length + rows),
        n_batch=options.n_batch,
        outputs=rows,
        threads=threads,
        threads_batch=options.threads_batch or threads,
        types=types,
        flash_attn=flash_attn,
        swa_full=swa_full,
        on_gpu=on_gpu,
    )
    return settings, length, note


def _context_length(request: LoadRequest, target: GgufFile, needed: Callable[[int], int], free: int) -> tuple[int, str]:
    """The tokens a sequence may hold, and a note if memory allows fewer than the model's own."""
    own = context_length(request, longest=target.header.of_architecture("context_length"))
    if request.context_length is not None:
        if needed(own) > free:
            raise OutOfMemoryError(
                f"A context of {own} tokens needs about {needed(own) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
                "of memory are free.",
                "Give a smaller `context_length`, or `engine_options={'type_k': 'q8_0', 'type_v': 'q8_0'}`.",
            )
        return own, ""
    length = own
    while length > _MULTIPLE and needed(length) > _SHARE * free:
        length = _rounded(length // 2)
    note = f"The context holds {length} tokens of the model's {own}: memory is scarce." if length < own else ""
    return length, note


def _free_after(weights: int) -> int:
    """Bytes of memory that are free once the weights are loaded."""
    free = free_memory()
    if weights > free:
        raise OutOfMemoryError(
            f"The weights take {weights / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free.",
            "Give `mmap=True` and `mlock=False`, or a smaller file.",
        )
    return free - weights


def _rounded(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE
