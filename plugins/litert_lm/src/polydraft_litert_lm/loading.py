"""From a load request to an engine of LiteRT-LM."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

from packaging.version import InvalidVersion, Version
from polydraft.caches import CacheFolder, CacheWarning
from polydraft.checkpoints.litertlm import LitertlmFile, read_litertlm
from polydraft.checkpoints.litertlm_files import fetch_litertlm
from polydraft.contract import LoadRequest, RunningInfo
from polydraft.engine_parts import context_length
from polydraft.errors import (
    DeviceError,
    InvalidRequestError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft.files import system_errors

from polydraft_litert_lm.engine import LitertLmEngine
from polydraft_litert_lm.options import LitertLmOptions
from polydraft_litert_lm.plugin import CACHE
from polydraft_litert_lm.runtime import Runtime
from polydraft_litert_lm.tokenizer import LitertTokenizer, read_vocabulary

__all__ = ["load_pair"]

_DEVICES = ("cpu", "gpu")
_PACKED = "model.litertlm.xz"


def load_pair(request: LoadRequest) -> LitertLmEngine:
    """Check the file before LiteRT-LM sees it, and make an engine.

    Raises:
        ModelFormatError: The file is missing, damaged, of another version, or lacks a tokenizer.
        SpeculationUnavailableError: It has no drafter inside.
        InvalidRequestError: Its drafter drafts another number of tokens than was asked for.
        DeviceError: LiteRT-LM has no such device.
        ContextLengthError: The context is longer than the model's.
        UnsupportedError: The dtype is not the file's, or the file needs a newer LiteRT-LM.
        EngineError: LiteRT-LM cannot make an engine of it.
    """
    options: LitertLmOptions = request.engine_options or LitertLmOptions()
    device = "cpu" if request.device == "auto" else request.device
    if device not in _DEVICES:
        raise DeviceError(f"LiteRT-LM has no device {device!r}.", f"Give one of: {', '.join(_DEVICES)}.")
    if device == "gpu" and options.threads is not None:
        raise InvalidRequestError(
            f"threads is {options.threads}, and the model runs on the GPU.", "Leave it out, or use `device='cpu'`."
        )
    file = read_litertlm(_file(request), request.target.id)
    k = _check(file, request)
    # A round writes its drafts before they are verified: room for them at the end of the context.
    spare = k + 1 if k else 0
    longest = min(filter(None, (file.metadata.max_num_tokens, file.cache_length)), default=None)
    length = context_length(request, longest=None if longest is None else longest - spare)
    vocabulary = read_vocabulary(file, request.target.id)
    threads = options.threads or _usual_threads()
    cache_dir = _cache_dir(options, file.path)
    runtime = Runtime(file.path, device, threads, length + spare, cache_dir, speculates=k > 0)
    try:
        tokenizer = LitertTokenizer(file, vocabulary, runtime.token_ids)
        running = RunningInfo.of(
            request,
            engine="litert-lm",
            engine_version=version("litert-lm-api"),
            dtype=file.weights_dtype or "as in the file",
            device=device,
            context_length=length,
            concurrency="serial",
        ).model_copy(update={"num_speculative_tokens": k})
        return LitertLmEngine(tokenizer, running, runtime)
    except BaseException:
        runtime.close()
        raise


def _file(request: LoadRequest) -> Path:
    """The model's file. That of the built-in pair is kept compressed, and unpacked once."""
    source = request.target
    packed = source.path / _PACKED if source.path is not None and source.path.is_dir() else None
    if packed is None or not packed.is_file():
        return fetch_litertlm(source, request.hub)

    def unpack(path: Path) -> None:
        with lzma.open(packed) as compressed, path.open("wb") as plain:
            shutil.copyfileobj(compressed, plain)

    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    return CacheFolder(*CACHE).file(f"{packed.parent.name}-{digest[:16]}.litertlm", unpack)


def _check(file: LitertlmFile, request: LoadRequest) -> int:
    """Refuse what the file is not fit for; returns k, 0 for plain decoding."""
    name, plan = request.target.id, request.plan
    if request.dtype not in {"auto", file.weights_dtype}:
        raise UnsupportedError(
            f"The weights of {name} are {file.weights_dtype or 'of an unknown type'}, and LiteRT-LM runs them as they "
            "are.",
            "Leave out `dtype`.",
        )
    needed, installed = file.metadata.min_runtime_version, version("litert-lm-api")
    if needed and _older(installed, needed):
        raise UnsupportedError(
            f"{name} needs LiteRT-LM {needed}, and {installed} is installed.",
            f"pip install 'litert-lm-api>={needed}'",
        )
    if plan.kind is None:
        return 0
    k = file.num_speculative_tokens
    if not file.has_drafter or k is None:
        raise SpeculationUnavailableError(f"{name} holds no drafter.", "Use `drafter=None`, or a file with a drafter.")
    if plan.k_chosen_by == "caller" and plan.num_speculative_tokens != k and plan.max_speculative_tokens is None:
        raise InvalidRequestError(
            f"`num_speculative_tokens={plan.num_speculative_tokens}` is not possible: the drafter inside {name} always "
            f"drafts {k} tokens.",
            f"Leave it out, or give `num_speculative_tokens={k}`.",
            argument="num_speculative_tokens",
        )
    return k


def _older(installed: str, needed: str) -> bool:
    try:
        return Version(installed) < Version(needed)
    except InvalidVersion:
        return False


def _usual_threads() -> int:
    """OMP_NUM_THREADS if it is set, else the number of cores that this process may use."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cache_dir(options: LitertLmOptions, path: Path) -> Path | None:
    """The folder for what is compiled, made; None: it cannot be made, and nothing is kept.

    LiteRT-LM goes by the file's name, so each state of a file has its own folder.
    """
    folder = options.cache_dir
    if folder is not None:
        what = f"The cache folder {folder} cannot be made"
        try:
            with system_errors(what):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequestError(
                f"{what}: {error.strerror or error}.", "Give another `cache_dir`.", argument="engine_options"
            ) from error
        return folder
    status = path.stat()
    state = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    folder = CacheFolder(*CACHE).path / "compiled" / hashlib.sha256(state.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(
            f"The cache folder {folder} cannot be made ({error.strerror or error}), so what LiteRT-LM compiles is not "
            f"kept. Set {CACHE[1]} to a folder that you may write.",
            CacheWarning,
            stacklevel=3,
        )
        return None
    return folder
