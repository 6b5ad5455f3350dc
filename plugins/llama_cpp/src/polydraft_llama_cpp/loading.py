"""From a load request to a loaded pair: files, device, memory, weights, contexts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from polydraft.contract import LoadRequest
from polydraft.errors import (
    ContextLengthError,
    InvalidRequestError,
    OutOfMemoryError,
    SpeculationUnavailableError,
    UnsupportedError,
)

from polydraft_llama_cpp.bindings import Device, devices, missing_for_mtp
from polydraft_llama_cpp.context import Context, ContextSettings
from polydraft_llama_cpp.devices import check_layers, find_device, usual_threads
from polydraft_llama_cpp.draft_model import DraftModel
from polydraft_llama_cpp.engine import LlamaCppEngine, Loaded, step_rows
from polydraft_llama_cpp.files import GgufFile, fetch_pair
from polydraft_llama_cpp.memory import available_bytes, context_bytes
from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.mtp import MtpDrafter
from polydraft_llama_cpp.options import LlamaCppOptions

__all__ = ["load_pair"]

_MULTIPLE = 256
"""llama.cpp's caches are a multiple of so many tokens long."""
_SHARE = 0.5
"""Of the free memory, what a context may take whose length the caller did not give."""


def load_pair(request: LoadRequest) -> LlamaCppEngine:
    """Load target and drafter.

    Raises:
        PairMismatchError: They do not fit.
        ModelFormatError: A file is missing, damaged, or unknown to llama.cpp.
        DeviceError: The device is not there.
        OutOfMemoryError: The context does not fit into the free memory.
        ContextLengthError: It is longer than the model's.
        SpeculationUnavailableError: The installed version has no MTP, or was not tested with it; a recurrent model.
        UnsupportedError: Bitwise steps on a device where they have not been measured; no model that generates.
    """
    options: LlamaCppOptions = request.engine_options or LlamaCppOptions()
    rows = step_rows(request)
    if options.n_batch < rows:
        raise InvalidRequestError(
            f"n_batch is {options.n_batch}, and a step runs {rows} tokens.", f"Give at least n_batch={rows}."
        )
    if request.plan.kind == "mtp" and (reason := missing_for_mtp(allow_untested=options.allow_untested)):
        raise SpeculationUnavailableError(
            reason, "Install a tested version, give engine_options={'allow_untested': True}, or use drafter='ngram'."
        )
    device = find_device(request.device)
    draft_device = find_device(options.device_draft) if options.device_draft else device
    on_gpu = device is None or not device.is_cpu
    check_layers("n_gpu_layers", options.n_gpu_layers, on_gpu=on_gpu)
    drafts_on_gpu = draft_device is None or not draft_device.is_cpu
    check_layers("n_gpu_layers_draft", options.n_gpu_layers_draft, on_gpu=drafts_on_gpu)
    if request.exactness == "bitwise" and on_gpu:
        raise UnsupportedError(
            "exactness='bitwise' has been measured with llama.cpp on the CPU only.", "Use device='cpu'."
        )
    target, drafter = fetch_pair(request)
    settings, context_length, notes = _settings(request, options, target, drafter, on_gpu=on_gpu)
    with ExitStack() as undo:
        model = _model(target, device, options.n_gpu_layers, options)
        undo.callback(model.free)
        _check_rollback(model, request)
        is_mtp = request.plan.kind == "mtp"
        context = Context(model, settings, keeps_hidden=is_mtp)
        undo.callback(context.free)
        side: MtpDrafter | DraftModel | None = None
        weights: Model | None = None
        if drafter is not None:
            layers = options.n_gpu_layers if options.n_gpu_layers_draft is None else options.n_gpu_layers_draft
            weights = _model(drafter, draft_device, layers, options)
            undo.callback(weights.free)
            _check_rollback(weights, request)
            side = MtpDrafter(weights, context, settings) if is_mtp else _draft_model(weights, settings)
        undo.pop_all()
    return LlamaCppEngine(
        Loaded(model, context, side, weights, context_length, target.dtype, _name(device), notes), request
    )


def _model(file: GgufFile, device: Device | None, layers: int | None, options: LlamaCppOptions) -> Model:
    on_cpu = device is not None and device.is_cpu
    return Model(
        file.path,
        file.source.id,
        device=device,
        n_gpu_layers=0 if on_cpu else -1 if layers is None else layers,
        mmap=options.mmap,
        mlock=options.mlock,
    )


def _check_rollback(model: Model, request: LoadRequest) -> None:
    if model.is_recurrent and request.plan.kind is not None:
        raise SpeculationUnavailableError(
            f"{model.name} has recurrent layers, whose state llama.cpp cannot take back when a draft is rejected.",
            "Use drafter=None." if model.name == request.target.id else "Use another drafter, or drafter=None.",
        )


def _draft_model(model: Model, settings: ContextSettings) -> DraftModel:
    # Drafts go in one by one: a sliding window's cache that drops tokens could not be rolled back.
    return DraftModel(Context(model, replace(settings, swa_full=True, outputs=1)))


def _settings(
    request: LoadRequest, options: LlamaCppOptions, target: GgufFile, drafter: GgufFile | None, *, on_gpu: bool
) -> tuple[ContextSettings, int, tuple[str, ...]]:
    rows = step_rows(request)
    auto_type = "f32" if target.weights == "f32" else "f16"
    type_k, type_v = (auto_type if given == "auto" else given for given in (options.type_k, options.type_v))
    quantized = type_v not in {"f32", "f16", "bf16"}
    if quantized and options.flash_attn == "off":
        raise InvalidRequestError(
            f"type_v is {type_v}, and flash_attn off: llama.cpp needs flash attention for quantized values.",
            "Give flash_attn='auto', or type_v='f16'.",
        )
    flash_attn = options.flash_attn == "on" or (options.flash_attn == "auto" and (on_gpu or quantized))
    swa_full = options.swa_full or request.exactness == "bitwise"

    def needed(length: int) -> int:
        total = context_bytes(
            target.header, length, options.n_batch, (type_k, type_v), flash_attn=flash_attn, swa_full=swa_full
        )
        if drafter is not None and request.plan.kind == "draft-model":
            total += context_bytes(
                drafter.header, length, options.n_batch, (type_k, type_v), flash_attn=flash_attn, swa_full=True
            )
        return total

    # Mapped weights can be dropped from memory and read again; others are there to stay.
    stay = not on_gpu and (options.mlock or not options.mmap)
    weights = sum(file.bytes for file in (target, drafter) if file is not None) if stay else 0
    context_length, notes = _context_length(request, options, target, needed, _free_beside(weights))
    threads = options.threads or usual_threads()
    settings = ContextSettings(
        length=_rounded(context_length + rows),
        n_batch=options.n_batch,
        outputs=rows,
        threads=threads,
        threads_batch=options.threads_batch or threads,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn,
        swa_full=swa_full,
        on_gpu=on_gpu,
    )
    return settings, context_length, notes


def _context_length(
    request: LoadRequest, options: LlamaCppOptions, target: GgufFile, needed: Callable[[int], int], free: int
) -> tuple[int, tuple[str, ...]]:
    """The tokens a sequence may hold, and a note where it is less than the model's own."""
    given = request.context_length if request.context_length is not None else options.n_ctx
    if request.context_length is not None and options.n_ctx not in {None, request.context_length}:
        raise InvalidRequestError(
            f"context_length is {request.context_length}, and n_ctx {options.n_ctx}.",
            "Give one of them: they mean the same.",
        )
    own = int(target.header.of_architecture("context_length") or 4096)
    if given is not None and given > own:
        raise ContextLengthError(
            f"context_length is {given}, and {target.source.id} was made for {own} tokens.", f"Give at most {own}."
        )
    if given is not None:
        if needed(given) > free:
            raise OutOfMemoryError(
                f"A context of {given} tokens needs about {needed(given) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
                "of memory are free.",
                "Give a smaller context_length, or engine_options={'type_k': 'q8_0', 'type_v': 'q8_0'}.",
            )
        return given, ()
    length = own
    while length > _MULTIPLE and needed(length) > _SHARE * free:
        length = _rounded(length // 2)
    if length == own:
        return own, ()
    return length, (f"The context holds {length} tokens, of {own} that the model can: memory is scarce.",)


def _free_beside(weights: int) -> int:
    free = available_bytes()
    if weights > free:
        raise OutOfMemoryError(
            f"The weights take {weights / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free.",
            "Give mmap=True and mlock=False, or a smaller file.",
        )
    return free - weights


def _rounded(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def _name(device: Device | None) -> str:
    if device is not None:
        return device.name
    return ",".join(found.name for found in devices() if not found.is_cpu)
