"""Transformers' own speculative decoding, ``generate``, on the loaded modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from polydraft_transformers.engine import TransformersEngine

__all__ = ["Generate"]


class Generate:
    """Implements ``polydraft.contract.UpstreamCall``.

    Args:
        engine: Has the modules.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        self._target: Any = engine.target.model
        self._drafter = engine.drafter_model

    def __call__(
        self,
        prompt_token_ids: Sequence[int],
        k: int,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        emit: Callable[[Sequence[int]], None],
    ) -> None:
        """As ``UpstreamCall``: with the drafter or, without one, by looking n-grams up in the prompt."""
        drafting: dict[str, Any] = {}
        if k and self._drafter is None:
            drafting["prompt_lookup_num_tokens"] = k
        elif k:
            own = self._drafter.generation_config
            own.num_assistant_tokens = k
            own.num_assistant_tokens_schedule = "constant"
            own.assistant_confidence_threshold = 0.0
            drafting["assistant_model"] = self._drafter
        device = self._target.device
        with torch.inference_mode():
            self._target.generate(
                torch.tensor([list(prompt_token_ids)], device=device),
                attention_mask=torch.ones((1, len(prompt_token_ids)), dtype=torch.long, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(eos_token_ids) or None,
                pad_token_id=0,
                streamer=_Emitting(emit),
                **drafting,
            )


class _Emitting(BaseStreamer):
    """Passes on the tokens of each step."""

    def __init__(self, emit: Callable[[Sequence[int]], None]) -> None:
        self._emit = emit
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then the new tokens of each step, (1, count) or (count,)."""
        if self._prompt_seen:
            self._emit(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left."""
