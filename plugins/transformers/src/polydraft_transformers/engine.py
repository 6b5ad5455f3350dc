"""A loaded pair."""

from __future__ import annotations

import threading
from importlib.metadata import version
from typing import Any

import torch
from polydraft.contract import EngineSequence, LoadRequest, MatmulPrecision, RunningInfo, SteppingEngine, Tokenizer
from polydraft.engine_parts.draft_model import DraftModelSequence

from polydraft_transformers.array_ops import TorchOps
from polydraft_transformers.decoder import Decoder
from polydraft_transformers.device_rounds import DeviceRounds
from polydraft_transformers.drafters.mtp import MtpDrafter, MtpSequence
from polydraft_transformers.sequence import TransformersSequence

__all__ = ["TransformersEngine", "matmul_precision"]


def matmul_precision(dtype: torch.dtype, device: torch.device) -> MatmulPrecision | None:
    """What torch rounds the factors of float32 products to on a GPU, if the app has set it so; None: it does not.

    Known of torch 2.9 and later: ``torch.set_float32_matmul_precision`` sets it, too.
    """
    set_to = getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    return "tf32" if (dtype, device.type, set_to) == (torch.float32, "cuda", "tf32") else None


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
        self._chunk: int | None = request.engine_options.prefill_chunk_size
        self._k = request.plan.max_draft_tokens
        self.running = RunningInfo.of(
            request,
            engine="transformers",
            engine_version=version("transformers"),
            dtype=str(target.dtype).removeprefix("torch."),
            matmul_precision=matmul_precision(target.dtype, target.device),
            device=str(target.device),
            context_length=context_length,
            concurrency="concurrent",
            notes=notes,
        )
        self._lock = threading.Lock()
        self._rounds: dict[Decoder, DeviceRounds] = {}

    @property
    def max_draft_tokens(self) -> int:
        """The session's largest k: each step has room for k drafts."""
        return self._k

    @property
    def shared_sequences(self) -> int:  # type: ignore[override]
        """Sequences whose rounds on a GPU are one launch."""
        rounds = self._rounds_of(self.target)
        return 1 if rounds is None else rounds.most_lanes

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
        drafter, rounds = self._drafter, self._rounds_of(self.target)
        if isinstance(drafter, MtpDrafter):
            return MtpSequence(self.target, drafter, self._chunk, self._lock, rounds)
        sequence = TransformersSequence(self.target, self._chunk, self._lock, rounds)
        if drafter is None:
            return sequence
        draft = TransformersSequence(drafter, self._chunk, self._lock, self._rounds_of(drafter))
        return DraftModelSequence(sequence, draft, drafter.step_rows)

    def _rounds_of(self, decoder: Decoder) -> DeviceRounds | None:
        """What the sequences of a model share; None if it runs no rounds."""
        if not decoder.runs_rounds:
            return None
        if decoder not in self._rounds:
            drafts = self._drafter if decoder is self._target and isinstance(self._drafter, MtpDrafter) else None
            # Of two sequences that open at the same time, both get the same.
            self._rounds.setdefault(decoder, DeviceRounds(decoder, drafts, self._lock))
        return self._rounds[decoder]

    def close(self) -> None:
        """Drop the models."""
        self._target = None
        self._drafter = None
        self._rounds.clear()
