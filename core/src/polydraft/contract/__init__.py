"""The contract between the core and its plugins: hooks, records, and the interfaces of engines.

Its version is ``CONTRACT_VERSION``. A plugin needs nothing of polydraft beyond the ``PUBLIC_MODULES``.
"""

from polydraft.contract.backend import EngineOptions, SpeculativeBackend, SteppingBackend
from polydraft.contract.hookspecs import PolydraftSpec, hookimpl
from polydraft.contract.processors import LogitsProcessor, StatefulLogitsProcessor
from polydraft.contract.public import PUBLIC_MODULES
from polydraft.contract.records import (
    CONTRACT_VERSION,
    SAMPLER_SETTINGS,
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
    HubOptions,
    LoadRequest,
    Message,
    ModelSource,
    OffReason,
    Prompt,
    Speculate,
    SpeculationPlan,
    TokenRequest,
)
from polydraft.contract.results import (
    Chunk,
    FinishReason,
    GenerationResult,
    GenerationStats,
    Round,
    RunningInfo,
    Segment,
    TokenLogprobs,
    ToolCall,
)
from polydraft.contract.stepping import Chooser, EngineSequence, LogitsHandle, Proposal, Step, SteppingEngine
from polydraft.contract.tokenizer import Tokenizer

__all__ = [
    "CONTRACT_VERSION",
    "DEFAULT_SETTINGS",
    "PUBLIC_MODULES",
    "SAMPLER_SETTINGS",
    "Acceptance",
    "BackendRecord",
    "Capabilities",
    "Chooser",
    "Chunk",
    "DeviceRecord",
    "Diagnosis",
    "DrafterKind",
    "EngineOptions",
    "EngineSequence",
    "Exactness",
    "Exclusion",
    "FaultRecord",
    "FinishReason",
    "GenerationResult",
    "GenerationSettings",
    "GenerationStats",
    "HubOptions",
    "LoadRequest",
    "LocalModelRecord",
    "LogitsHandle",
    "LogitsProcessor",
    "Message",
    "ModelSource",
    "OffReason",
    "PairRecord",
    "PolydraftSpec",
    "Prompt",
    "Proposal",
    "Round",
    "RunningInfo",
    "Segment",
    "Speculate",
    "SpeculationPlan",
    "SpeculativeBackend",
    "StatefulLogitsProcessor",
    "Step",
    "SteppingBackend",
    "SteppingEngine",
    "TokenLogprobs",
    "TokenRequest",
    "Tokenizer",
    "ToolCall",
    "hookimpl",
]
