"""A loaded pair."""

from __future__ import annotations

import threading
from importlib.metadata import version
from typing import Any

from polydraft.contract import EngineSequence, LoadRequest, RunningInfo, SteppingEngine, Tokenizer
from polydraft.engine_parts.draft_model import DraftModelSequence

from polydraft_transformers.array_ops import TorchOps
from polydraft_transformers.decoder import Decoder
from polydraft_transformers.drafters.mtp import MtpDrafter, MtpSequence
from polydraft_transformers.sequence import TransformersSequence

__all__ = ["TransformersEngine"]


class TransformersEngine(SteppingEngine):
    """A target and its drafter in torch.

    Args:
        target: The target.
        drafter: An MTP drafter, a draft model, or None.
        tokenizer: The tokenizer of the target.
        request: What was loaded.
        context_length: Tokens of prompt and output together.
        notes: What the user should know, a sentence each.
    """

    array_ops = TorchOps()

    def __init__(
        self,
        target: Decoder,
        drafter: MtpDrafter | Decoder | None,
        tokenizer: Tokenizer,
        request: LoadRequest,
        context_length: int,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._target: Decoder | None = target
        self._drafter = drafter
        self._chunk: int = request.engine_options.prefill_chunk_size
        self._k = request.plan.max_draft_tokens
        self.running = RunningInfo.of(
            request,
            engine="transformers",
            engine_version=version("transformers"),
            dtype=str(target.dtype).removeprefix("torch."),
            device=str(target.device),
            context_length=context_length,
            concurrency="concurrent",
            notes=notes,
        )
        self._lock = threading.Lock()

    @property
    def max_draft_tokens(self) -> int:
        """The session's largest k: each step has room for k drafts."""
        return self._k

    @property
    def target(self) -> Decoder:
        """The target; not after ``close``."""
        assert self._target is not None
        return self._target

    @property
    def drafter_model(self) -> Any:
        """Transformers' module of the drafter; None where no model drafts."""
        if isinstance(self._drafter, MtpDrafter):
            return self._drafter.assistant
        return None if self._drafter is None else self._drafter.model

    def open_sequence(self) -> EngineSequence:
        """A sequence with its own buffers."""
        if isinstance(self._drafter, MtpDrafter):
            return MtpSequence(self.target, self._drafter, self._chunk, self._lock)
        sequence = TransformersSequence(self.target, self._chunk, self._lock)
        if self._drafter is None:
            return sequence
        draft = TransformersSequence(self._drafter, self._chunk, self._lock)
        return DraftModelSequence(sequence, draft, self._drafter.step_rows)

    def close(self) -> None:
        """Drop the models."""
        self._target = None
        self._drafter = None
