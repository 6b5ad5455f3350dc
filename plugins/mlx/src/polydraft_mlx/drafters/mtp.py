"""Drafting with a Gemma 4 assistant: the protocol between it and the target.

As in Transformers 5.22 (``SinglePositionMultiTokenCandidateGenerator`` in generation/candidate_generator.py): the
newest token has position p. All steps of a round use p as the position and attend to the target's keys and values of
the positions before p, taken from the last layer of each attention type that stores its own. The first step's input is
the newest token's embedding (the target's, scaled), concatenated with the target's final-normed hidden row of position
p-1. Each further step takes the drafted token and the assistant's own output, projected back to the target's width.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from polydraft.contract import Sampler

from polydraft_mlx.assistant import Assistant
from polydraft_mlx.decoder import Decoder, widened
from polydraft_mlx.greedy import GreedyDrafts
from polydraft_mlx.kv_cache import KvCache, LayerCache, SlidingCache
from polydraft_mlx.resources import start

__all__ = ["MtpDrafter"]


class MtpDrafter:
    """A loaded assistant for one target.

    Args:
        assistant: Its network.
        target: The target it drafts for, a Gemma 4.
    """

    def __init__(self, assistant: Assistant, target: Decoder) -> None:
        self._assistant = assistant
        self._target = target
        # Layers that store KV come first. Of each type the dict keeps the last one.
        owners = target.gemma4.layers[: len(target.new_cache().layers)]
        self._sources = {layer.layer_type: index for index, layer in enumerate(owners)}

    def propose(
        self, cache: KvCache, hidden: mx.array, newest: int, k: int, sampler: Sampler, *, keep_logits: bool
    ) -> tuple[list[int], mx.array | None]:
        """Draft k tokens after ``newest``.

        Args:
            cache: The target's KV cache; its ``length`` is the position of ``newest``.
            hidden: The target's hidden row before it, shape (1, 1, hidden_size).
            newest: The newest token.
            k: At least 1.
            sampler: Chooses the drafts.
            keep_logits: Whether to return the logits, shape (k, vocab).
        """
        position = mx.array(cache.length)
        shared = {kind: self._shared(cache.layers[index]) for kind, index in self._sources.items()}
        token = mx.array([newest])
        drafts: list[mx.array] = []
        kept: list[mx.array] = []
        known = [newest]
        greedy = GreedyDrafts.of(sampler, cache.length + 1)
        for step in range(k):
            inputs = mx.concatenate([self._target.embed(token)[None], hidden], axis=-1)
            logits, hidden = self._assistant(inputs, shared, position)
            # A target that was trained further may have more tokens than its assistant.
            logits = widened(logits, self._target.vocab_size)
            prefix = known if sampler.needs_prefix else None
            # Noise belongs to the draft's own position, unlike the assistant's rotation.
            position_of_draft = cache.length + 1 + step
            token = greedy.choose(logits) if greedy else sampler.choose_draft(logits, position_of_draft, prefix)
            start(token)
            drafts.append(token)
            if sampler.needs_prefix:
                known.append(int(token))
            if keep_logits:
                kept.append(logits)
        found: Any = greedy.found(drafts) if greedy else mx.concatenate(drafts).tolist()
        return found, mx.concatenate(kept) if kept else None

    @staticmethod
    def _shared(layer: LayerCache) -> tuple[mx.array, mx.array, mx.array | None]:
        first = 0
        if isinstance(layer, SlidingCache):
            # Upstream's mask shows the drafter distances up to and including the window: one row more than the
            # target's own layers see (create_bidirectional_sliding_window_mask in masking_utils.py).
            first = max(layer.offset - layer.window - 1, 0)
        return layer.visible(first)
