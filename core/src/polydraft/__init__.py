"""One API for speculative decoding, whatever engine runs it.

>>> import polydraft
>>> with polydraft.load("google/gemma-4-E4B-it") as session:  # doctest: +SKIP
...     result = session.generate("Explain speculative decoding.", max_new_tokens=256)

Importing this package imports no engine, and nothing else that is slow: the names below are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Not lazy: the module bears the function's name, and importing the module later would put it in the function's place.
from polydraft.load import load

if TYPE_CHECKING:
    from polydraft.contract.backend import EngineOptions, SpeculativeBackend, SteppingBackend
    from polydraft.contract.hookspecs import hookimpl
    from polydraft.contract.processors import LogitsProcessor, StatefulLogitsProcessor
    from polydraft.contract.records import (
        CONTRACT_VERSION,
        BackendRecord,
        Capabilities,
        DeviceRecord,
        Diagnosis,
        DrafterKind,
        Exactness,
        Exclusion,
        FaultRecord,
        LocalModelRecord,
        PairRecord,
    )
    from polydraft.contract.requests import (
        DEFAULT_SETTINGS,
        Acceptance,
        GenerationSettings,
        Message,
        OffReason,
        Prompt,
        Speculate,
    )
    from polydraft.contract.results import (
        Chunk,
        FinishReason,
        GenerationResult,
        GenerationStats,
        RunningInfo,
        Segment,
        TokenLogprobs,
        ToolCall,
        Verified,
    )
    from polydraft.errors import (
        BackendNotFoundError,
        BackendUnavailableError,
        ContextLengthError,
        DeviceError,
        EngineError,
        ForkedSessionError,
        InvalidRequestError,
        LogitsProcessorError,
        ModelFormatError,
        ModelNotFoundError,
        NotVerifiedError,
        OutOfMemoryError,
        PairMismatchError,
        PluginError,
        PolydraftError,
        SessionBusyError,
        SessionClosedError,
        SpeculationUnavailableError,
        UnsupportedError,
    )
    from polydraft.plugins import PluginHost, PluginStatus, default_host
    from polydraft.session.base import Session

    __version__: str

_MODULES = {
    "polydraft.contract.backend": ("EngineOptions", "SpeculativeBackend", "SteppingBackend"),
    "polydraft.contract.hookspecs": ("hookimpl",),
    "polydraft.contract.processors": ("LogitsProcessor", "StatefulLogitsProcessor"),
    "polydraft.contract.records": (
        "CONTRACT_VERSION",
        "BackendRecord",
        "Capabilities",
        "DeviceRecord",
        "Diagnosis",
        "DrafterKind",
        "Exactness",
        "Exclusion",
        "FaultRecord",
        "LocalModelRecord",
        "PairRecord",
    ),
    "polydraft.contract.requests": (
        "DEFAULT_SETTINGS",
        "Acceptance",
        "GenerationSettings",
        "Message",
        "OffReason",
        "Prompt",
        "Speculate",
    ),
    "polydraft.contract.results": (
        "Chunk",
        "FinishReason",
        "GenerationResult",
        "GenerationStats",
        "RunningInfo",
        "Segment",
        "TokenLogprobs",
        "ToolCall",
        "Verified",
    ),
    "polydraft.errors": (
        "BackendNotFoundError",
        "BackendUnavailableError",
        "ContextLengthError",
        "DeviceError",
        "EngineError",
        "ForkedSessionError",
        "InvalidRequestError",
        "LogitsProcessorError",
        "ModelFormatError",
        "ModelNotFoundError",
        "NotVerifiedError",
        "OutOfMemoryError",
        "PairMismatchError",
        "PluginError",
        "PolydraftError",
        "SessionBusyError",
        "SessionClosedError",
        "SpeculationUnavailableError",
        "UnsupportedError",
    ),
    "polydraft.plugins": ("PluginHost", "PluginStatus", "default_host"),
    "polydraft.session.base": ("Session",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CONTRACT_VERSION",
    "DEFAULT_SETTINGS",
    "Acceptance",
    "BackendNotFoundError",
    "BackendRecord",
    "BackendUnavailableError",
    "Capabilities",
    "Chunk",
    "ContextLengthError",
    "DeviceError",
    "DeviceRecord",
    "Diagnosis",
    "DrafterKind",
    "EngineError",
    "EngineOptions",
    "Exactness",
    "Exclusion",
    "FaultRecord",
    "FinishReason",
    "ForkedSessionError",
    "GenerationResult",
    "GenerationSettings",
    "GenerationStats",
    "InvalidRequestError",
    "LocalModelRecord",
    "LogitsProcessor",
    "LogitsProcessorError",
    "Message",
    "ModelFormatError",
    "ModelNotFoundError",
    "NotVerifiedError",
    "OffReason",
    "OutOfMemoryError",
    "PairMismatchError",
    "PairRecord",
    "PluginError",
    "PluginHost",
    "PluginStatus",
    "PolydraftError",
    "Prompt",
    "RunningInfo",
    "Segment",
    "Session",
    "SessionBusyError",
    "SessionClosedError",
    "Speculate",
    "SpeculationUnavailableError",
    "SpeculativeBackend",
    "StatefulLogitsProcessor",
    "SteppingBackend",
    "TokenLogprobs",
    "ToolCall",
    "UnsupportedError",
    "Verified",
    "__version__",
    "default_host",
    "hookimpl",
    "load",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("polydraft")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
