"""Translate vLLM's start-up errors into polydraft's."""

from __future__ import annotations

import re

from polydraft.errors import EngineError, InvalidRequestError, ModelFormatError, OutOfMemoryError, PolydraftError
from polydraft.files import system_error

__all__ = ["server_start_error", "start_error"]

_EXCEPTION = re.compile(
    r"^(?:\(.*?\) ERROR [^\]]*\] )?((?:[\w.]*(?:Error|Exception)|\w+\.py: error): .*)$", re.MULTILINE
)
"""A line of a server's log that names an exception, or argparse's error."""
_LOG_LINES = 12
_MEMORY = ("memory", "KV cache", "out of memory", "No available memory")
_FORMAT = ("architectures", "not supported for now", "safetensors", "checkpoint", "weights", "tokenizer")


def start_error(error: BaseException, target: str) -> PolydraftError:
    """The typed error for an exception that vLLM raised while it started."""
    if isinstance(error, PolydraftError):
        return error
    if not isinstance(error, MemoryError) and (refused := system_error(error, f"vLLM cannot start {target}")):
        return refused
    message = _first_sentences(str(error)) or type(error).__name__
    said = f"vLLM cannot start {target}: {message}"
    if "memory profiling" in message:  # vLLM's memory grew while it measured how much it takes
        return OutOfMemoryError(
            said,
            "Load it again when other programs on this GPU have ended, or give "
            "`engine_options={'kv_cache_memory_bytes': ...}`: then nothing is measured.",
        )
    if isinstance(error, MemoryError) or any(mark in message for mark in _MEMORY):
        return OutOfMemoryError(
            said, "Give `engine_options={'kv_cache_memory_bytes': ...}` another value, or a smaller `context_length`."
        )
    if "failed to be inspected" in message:  # an import failed; only vLLM's log says which
        return ModelFormatError(
            said, "Its log says what is missing; models with image input need a torchvision that matches torch's build."
        )
    if any(mark in message for mark in _FORMAT):
        return ModelFormatError(said, "Check that the checkpoint is complete and this version knows its architecture.")
    if isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return InvalidRequestError(said, "Change the engine option that it names.")
    return EngineError(said, "Its log, on standard error, may say more (VLLM_LOGGING_LEVEL=DEBUG).")


def server_start_error(target: str, log: str) -> PolydraftError:
    """The typed error for a server that ended before it was ready: the first exception in its log says why."""
    # The engine's process logs the reason; the server's process only that the engine did not start.
    named = [line for line in _EXCEPTION.findall(log) if "Engine core initialization failed" not in line]
    why = named[0] if named else "\n".join(log.splitlines()[-_LOG_LINES:]) or "it ended at once"
    return start_error(RuntimeError(why), target)


def _first_sentences(text: str) -> str:
    """The first informative line: pydantic starts with a count of errors and ends with a link."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:
        lines = lines[1:]
    return lines[0].removeprefix("Value error, ").partition(" [type=")[0] if lines else ""
