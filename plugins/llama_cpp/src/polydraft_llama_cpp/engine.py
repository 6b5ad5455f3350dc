"""A loaded pair."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from polydraft.contract import LoadRequest, RunningInfo, SteppingEngine
from polydraft.errors import SessionBusyError, SessionClosedError

from polydraft_llama_cpp.bindings import version_of
from polydraft_llama_cpp.context import Context
from polydraft_llama_cpp.draft_model import DraftModel
from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.mtp import MtpDrafter
from polydraft_llama_cpp.sequence import LlamaCppSequence
from polydraft_llama_cpp.tokenizer import GgufTokenizer

__all__ = ["LlamaCppEngine", "Loaded"]


@dataclass(frozen=True)
class Loaded:
    """What ``loading`` made: the parts of an engine."""

    target: Model
    context: Context
    drafter: MtpDrafter | DraftModel | None
    draft_weights: Model | None
    context_length: int
    dtype: str
    device: str
    notes: tuple[str, ...]


def step_rows(request: LoadRequest) -> int:
    """Rows of a step at most; in a bitwise session of every step.

    These come in groups of four: with repacked weights (quantized ones, on most processors) llama.cpp runs groups of
    four rows through one kernel and the rows left over through another (ggml-cpu/repack.cpp).
    """
    rows = request.plan.num_speculative_tokens + 1 if request.plan.kind else 1
    return -(-rows // 4) * 4 if request.exactness == "bitwise" else rows


class LlamaCppEngine(SteppingEngine):
    """See ``SteppingEngine``. llama.cpp allocates its cache at load, for one sequence: calls are serial."""

    max_sequences = 1

    def __init__(self, loaded: Loaded, request: LoadRequest) -> None:
        self.tokenizer = GgufTokenizer(loaded.target)
        self._loaded: Loaded | None = loaded
        self._k = request.plan.num_speculative_tokens if request.plan.kind else 0
        self._fixed_rows = step_rows(request) if request.exactness == "bitwise" else 0
        self._busy = False
        self._lock = threading.Lock()
        self.running = RunningInfo.of(
            request,
            engine="llama-cpp-python",
            engine_version=version_of(),
            dtype=loaded.dtype,
            device=loaded.device,
            context_length=loaded.context_length,
            concurrency="serial",
            notes=loaded.notes,
        )

    @property
    def max_draft_tokens(self) -> int:
        """The session's k."""
        return self._k

    @property
    def _parts(self) -> Loaded:
        if self._loaded is None:
            raise SessionClosedError("This engine is closed.", "Load the pair again.")
        return self._loaded

    def open_sequence(self) -> LlamaCppSequence:
        """The sequence, empty.

        Raises:
            SessionBusyError: The last one has not been closed.
        """
        loaded = self._parts
        with self._lock:
            if self._busy:
                raise SessionBusyError(
                    "A sequence of this engine is still open, and llama.cpp's cache holds one.", "Close it first."
                )
            self._busy = True
        loaded.context.clear()
        if isinstance(loaded.drafter, DraftModel):
            loaded.drafter.clear()
        return LlamaCppSequence(loaded.context, loaded.drafter, self._fixed_rows, self._release)

    def _release(self) -> None:
        with self._lock:
            self._busy = False

    def close(self) -> None:
        """Free contexts and weights, the drafter's first: it shares the target's memory."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            if loaded.drafter is not None:
                loaded.drafter.free()
            loaded.context.free()
            if loaded.draft_weights is not None:
                loaded.draft_weights.free()
            loaded.target.free()
