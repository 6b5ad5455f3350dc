# The names that apps use; `__init__.py` loads each of them on first use.
from . import contract as contract
from . import errors as errors
from ._environments.listing import engines as engines
from ._environments.records import EngineState as EngineState
from ._load import load as load
from ._plugins import PluginHost as PluginHost
from ._plugins import PluginStatus as PluginStatus
from ._plugins import default_host as default_host
from ._session.async_stream import AsyncTokenStream as AsyncTokenStream
from ._session.monitor import SpeculationWarning as SpeculationWarning
from ._session.session import Session as Session
from ._session.stream import TokenStream as TokenStream
from .contract.packings import Packing as Packing
from .contract.processors import LogitsProcessor as LogitsProcessor
from .contract.processors import StatefulLogitsProcessor as StatefulLogitsProcessor
from .contract.records import DrafterKind as DrafterKind
from .contract.records import Exactness as Exactness
from .contract.requests import Acceptance as Acceptance
from .contract.requests import GenerationSettings as GenerationSettings
from .contract.requests import Message as Message
from .contract.requests import OffReason as OffReason
from .contract.requests import Prompt as Prompt
from .contract.requests import Speculate as Speculate
from .contract.results import Chunk as Chunk
from .contract.results import FinishReason as FinishReason
from .contract.results import GenerationResult as GenerationResult
from .contract.results import GenerationStats as GenerationStats
from .contract.results import RunningInfo as RunningInfo
from .contract.results import Segment as Segment
from .contract.results import TokenLogprobs as TokenLogprobs
from .contract.results import ToolCall as ToolCall
from .contract.results import Verified as Verified
from .verification import VerificationWarning as VerificationWarning

__version__: str
