"""What vLLM raises at start, as polydraft's errors."""

from __future__ import annotations

from polydraft.errors import (
    EngineError,
    InvalidRequestError,
    ModelFormatError,
    OutOfMemoryError,
    PolydraftError,
)

__all__ = ["start_error"]

_MEMORY = ("memory", "KV cache", "out of memory", "No available memory")
_FORMAT = ("architectures", "not supported for now", "safetensors", "checkpoint", "weights", "tokenizer")


def start_error(error: BaseException, target: str) -> PolydraftError:
    """The typed error for what vLLM raised while it started.

    Args:
        error: vLLM's.
        target: The target's name.
    """
    if isinstance(error, PolydraftError):
        return error
    message = _first_sentences(str(error)) or type(error).__name__
    said = f"vLLM cannot start {target}: {message}"
    if isinstance(error, MemoryError) or any(mark in message for mark in _MEMORY):
        return OutOfMemoryError(
            said, "Give engine_options={'kv_cache_memory_bytes': ...} another value, or a smaller context_length."
        )
    if "failed to be inspected" in message:  # an import failed: vLLM's log tells which
        return ModelFormatError(
            said, "Its log says what is missing; models that take images need a torchvision of torch's own build."
        )
    if any(mark in message for mark in _FORMAT):
        return ModelFormatError(said, "Check that the checkpoint is whole and its architecture known to this version.")
    if isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return InvalidRequestError(said, "Change the engine option that it names.")
    return EngineError(said, "Its log, on standard error, may say more (VLLM_LOGGING_LEVEL=DEBUG).")


def _first_sentences(text: str) -> str:
    """The first line that says something: pydantic begins with a count of errors, and ends with a link."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:
        lines = lines[1:]
    return lines[0].removeprefix("Value error, ").partition(" [type=")[0] if lines else ""
