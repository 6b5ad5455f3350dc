"""A loaded pair."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from polydraft.contract import LoadRequest, MatmulPrecision, RunningInfo, SteppingEngine, Tokenizer

from polydraft_mlx.array_ops import MlxOps
from polydraft_mlx.decoder import Decoder
from polydraft_mlx.drafters.draft_model import DraftModel
from polydraft_mlx.drafters.mtp import MtpDrafter
from polydraft_mlx.resources import Runtime
from polydraft_mlx.sequence import MlxSequence

__all__ = ["MlxEngine"]


class MlxEngine(SteppingEngine):
    """A target and its drafter in MLX.

    Args:
        runtime: Device and stream.
        target: The target.
        drafter: An MTP drafter, a draft model, or None.
        tokenizer: The tokenizer of the target.
        request: What was loaded.
        context_length: Tokens that a sequence can hold.
        notes: What the user should know about it, one sentence each.
        precision: Of matrix products, where it is below the dtype's.
    """

    array_ops = MlxOps()

    def __init__(
        self,
        runtime: Runtime,
        target: Decoder,
        drafter: MtpDrafter | Decoder | None,
        tokenizer: Tokenizer,
        request: LoadRequest,
        context_length: int,
        notes: Sequence[str] = (),
        precision: MatmulPrecision | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._runtime = runtime
        self._target: Decoder | None = target
        self._drafter = drafter
        self._chunk: int = request.engine_options.prefill_chunk_size
        self._k = request.plan.max_draft_tokens
        self.running = RunningInfo.of(
            request,
            engine="mlx-lm",
            engine_version=version("mlx-lm"),
            dtype=target.dtype,
            device=runtime.name,
            context_length=context_length,
            concurrency="concurrent",
            notes=notes,
            matmul_precision=precision,
        )

    @property
    def max_draft_tokens(self) -> int:
        """The session's largest k."""
        return self._k

    @property
    def target(self) -> Decoder:
        """The target; gone after ``close``."""
        assert self._target is not None
        return self._target

    @property
    def draft_model(self) -> Any:
        """mlx-lm's module of the draft model; None where none drafts."""
        return self._drafter.model if isinstance(self._drafter, Decoder) else None

    @staticmethod
    def peak_memory_bytes() -> int:
        """Peak memory of MLX in this process, since its start or the last ``reset_peak_memory``."""
        return int(mx.get_peak_memory())

    @staticmethod
    def reset_peak_memory() -> None:
        """Start measuring the peak again."""
        mx.reset_peak_memory()

    def open_sequence(self) -> MlxSequence:
        """A sequence with its own buffers."""
        drafter = self._drafter
        side = DraftModel(drafter, self._chunk, self.target.vocab_size) if isinstance(drafter, Decoder) else drafter
        return MlxSequence(self._runtime, self.target, side, self._chunk)

    def close(self) -> None:
        """Drop the models, and free the buffers that MLX has cached."""
        self._target = None
        self._drafter = None
        mx.clear_cache()
