"""A loaded pair."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import mlx.core as mx
from polydraft.contract import LoadRequest, RunningInfo, SteppingEngine, Tokenizer

from polydraft_mlx.decoder import Decoder
from polydraft_mlx.draft_model import DraftModel
from polydraft_mlx.mlx_ops import MlxOps
from polydraft_mlx.mtp import MtpDrafter
from polydraft_mlx.runtime import Runtime
from polydraft_mlx.sequence import MlxSequence

__all__ = ["MlxEngine"]


class MlxEngine(SteppingEngine):
    """A target and its drafter in MLX.

    Args:
        runtime: Device and stream.
        target: The target.
        drafter: An MTP drafter, a draft model, or None.
        tokenizer: The target's.
        request: What was asked for.
        context_length: Tokens a sequence may hold.
        notes: What the user should know of what was loaded, one sentence each.
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
    ) -> None:
        self.tokenizer = tokenizer
        self._runtime = runtime
        self._target: Decoder | None = target
        self._drafter = drafter
        self._chunk: int = request.engine_options.prefill_chunk_size
        self._k = request.plan.num_speculative_tokens
        self.running = RunningInfo.of(
            request,
            engine="mlx-lm",
            engine_version=version("mlx-lm"),
            dtype=target.dtype,
            device=runtime.name,
            context_length=context_length,
            concurrency="concurrent",
            notes=notes,
        )

    @property
    def max_draft_tokens(self) -> int:
        """The session's k."""
        return self._k

    @property
    def target(self) -> Decoder:
        """The target; not after ``close``."""
        assert self._target is not None
        return self._target

    @staticmethod
    def peak_memory_bytes() -> int:
        """The most that MLX has held at a time in this process, since its start or ``reset_peak_memory``."""
        return int(mx.get_peak_memory())

    @staticmethod
    def reset_peak_memory() -> None:
        """Begin to measure the peak anew."""
        mx.reset_peak_memory()

    def open_sequence(self) -> MlxSequence:
        """A sequence with buffers of its own."""
        drafter = self._drafter
        side = DraftModel(drafter, self._chunk, self.target.vocab_size) if isinstance(drafter, Decoder) else drafter
        return MlxSequence(self._runtime, self.target, side, self._chunk)

    def close(self) -> None:
        """Drop the models, and give MLX's cached buffers back."""
        self._target = None
        self._drafter = None
        mx.clear_cache()
