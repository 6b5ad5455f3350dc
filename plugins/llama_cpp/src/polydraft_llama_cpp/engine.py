"""A loaded pair."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from polydraft.contract import EngineSequence, LoadRequest, RunningInfo, SteppingEngine
from polydraft.engine_parts.draft_model import DraftModelSequence
from polydraft.errors import SessionBusyError, SessionClosedError

from polydraft_llama_cpp.context import Context
from polydraft_llama_cpp.drafters.mtp import MtpDrafter
from polydraft_llama_cpp.sequence import LlamaCppSequence
from polydraft_llama_cpp.tokenizer import GgufTokenizer

__all__ = ["LlamaCppEngine", "step_rows"]


def step_rows(request: LoadRequest) -> int:
    """The most rows of a step; in a bitwise session the rows of every step.

    These come in groups of four: with repacked weights (quantized ones, on most processors) llama.cpp runs groups of
    four rows through one kernel and the remaining rows through another (ggml-cpu/repack.cpp).
    """
    rows = request.plan.max_draft_tokens + 1 if request.plan.kind else 1
    return -(-rows // 4) * 4 if request.exactness == "bitwise" else rows


class LlamaCppEngine(SteppingEngine):
    """A target's context, with an MTP drafter on it or a draft model's context next to it.

    llama.cpp allocates a cache at load, for one sequence, so calls are serial. ``resources`` frees contexts and weights
    in the right order.
    """

    max_sequences = 1

    def __init__(
        self,
        request: LoadRequest,
        running: RunningInfo,
        target: Context,
        drafter: MtpDrafter | Context | None,
        tokenizer: GgufTokenizer,
        resources: ExitStack,
    ) -> None:
        self.tokenizer = tokenizer
        self.running = running
        self._target = target
        self._drafter = drafter
        self._resources = resources
        self._rows = step_rows(request)
        self._fixed_rows = self._rows if request.exactness == "bitwise" else 0
        self._busy = self._closed = self._spoilt = False
        self._lock = threading.Lock()

    @property
    def max_draft_tokens(self) -> int:
        """The session's largest k."""
        return self.running.max_draft_tokens

    def open_sequence(self) -> EngineSequence:
        """The sequence, empty.

        Raises:
            SessionBusyError: The last one has not been closed.
            SessionClosedError: The engine is closed.
        """
        if self._closed:
            raise SessionClosedError("This engine is closed.", "Load the pair again.")
        with self._lock:
            if self._busy:
                raise SessionBusyError(
                    "A sequence of this engine is still open, and llama.cpp's cache holds one.", "Close it first."
                )
            self._busy = True
        self._target.clear(data=self._spoilt)
        if isinstance(self._drafter, Context):
            self._drafter.clear(data=self._spoilt)
            target = LlamaCppSequence(self._target, None, self._fixed_rows, self._release)
            return DraftModelSequence(target, LlamaCppSequence(self._drafter), self._rows)
        return LlamaCppSequence(self._target, self._drafter, self._fixed_rows, self._release)

    def _release(self, spoilt: bool) -> None:
        with self._lock:
            self._busy, self._spoilt = False, spoilt

    def close(self) -> None:
        """Free contexts and weights."""
        self._closed = True
        self._resources.close()
