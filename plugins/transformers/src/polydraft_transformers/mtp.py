"""Gemma 4's MTP drafter ("assistant"): it attends to the target's KV and has none of its own.

Protocol: ``SinglePositionMultiTokenCandidateGenerator`` in Transformers' generation/candidate_generator.py. To draft
after the newest token x at position p: input = concat(target embedding of x, h), where h is the target's final-normed
hidden row of position p-1; position p for all steps of the round; K/V = the target's for positions before p. Each step
gives logits and the h of the next step. Unlike upstream no K/V row of a rejected draft is ever seen.
"""

from __future__ import annotations

from typing import Any

import torch
from polydraft.contract import Chooser

from polydraft_transformers.decoder import Decoder
from polydraft_transformers.kv_cache import KvCache

__all__ = ["MtpDrafter"]


class MtpDrafter:
    """A loaded assistant for one target.

    Args:
        assistant: ``Gemma4AssistantForCausalLM`` or its unified twin.
        target: The target it drafts for.
    """

    def __init__(self, assistant: Any, target: Decoder) -> None:
        self._assistant = assistant
        self._target = target
        shared = int(getattr(target.config, "num_kv_shared_layers", 0) or 0)
        owners = target.layer_types[: len(target.layer_types) - shared]
        self._sources = {kind: max(i for i, other in enumerate(owners) if other == kind) for kind in set(owners)}
        self._masks = dict.fromkeys(("full_attention", "sliding_attention"))

    def propose(
        self, cache: KvCache, hidden: torch.Tensor, newest: int, k: int, chooser: Chooser, *, keep_logits: bool
    ) -> tuple[list[int], torch.Tensor | None]:
        """Draft k tokens after ``newest``.

        Args:
            cache: The target's; its ``length`` is the position of ``newest``.
            hidden: The target's hidden row before it, shape (1, 1, hidden_size).
            newest: The newest token.
            k: At least 1.
            chooser: Chooses the drafts.
            keep_logits: Whether to return the logits, shape (k, vocab).
        """
        position = cache.length
        shared = {kind: self._shared(cache, kind, layer, position) for kind, layer in self._sources.items()}
        positions = torch.tensor([[position]], device=hidden.device)
        token = torch.tensor([newest], device=hidden.device)
        drafts: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        known = [newest]
        for step in range(k):
            inputs = torch.cat([self._target.embed(token)[None], hidden], dim=-1)
            logits, hidden = self._step(inputs, positions, shared)
            token = chooser.choose_draft(logits, position + 1 + step, known if chooser.needs_prefix else None)
            drafts.append(token)
            if chooser.needs_prefix:
                known.append(int(token))
            if keep_logits:
                kept.append(logits)
        return torch.cat(drafts).tolist(), torch.cat(kept) if kept else None

    def _shared(self, cache: KvCache, kind: str, layer: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = 0
        if kind == "sliding_attention" and self._target.window is not None:
            # Upstream's mask lets the drafter see distances up to the window, inclusive: one row more than the
            # target's own layers (create_bidirectional_sliding_window_mask in masking_utils.py).
            first = max(position - self._target.window - 1, 0)
        return cache.view(layer, first, position)

    def _step(self, inputs: torch.Tensor, positions: torch.Tensor, shared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step: logits (1, vocab) and the next h (1, 1, hidden_size of the target)."""
        assistant = self._assistant
        row = assistant.model(
            input_ids=None,
            inputs_embeds=assistant.pre_projection(inputs),
            attention_mask=self._masks,
            position_ids=positions,
            shared_kv_states=dict(shared),
            use_cache=False,
        ).last_hidden_state
        return self._head(row[0]), assistant.post_projection(row)

    def _head(self, row: torch.Tensor) -> torch.Tensor:
        """Logits of a hidden row (1, hidden_size of the drafter)."""
        centroids = self._assistant.masked_embedding
        weight = self._assistant.lm_head.weight
        if centroids is None:
            return torch.nn.functional.linear(row, weight)
        # Only the tokens of the best clusters get logits of their own; the others one below the smallest of these
        # (Gemma4AssistantMaskedEmbedder), computed without waiting for the device.
        top = centroids.centroids(row).topk(centroids.centroid_intermediate_top_k, dim=-1).indices[0]
        ids = centroids.token_ordering.view(centroids.num_centroids, -1)[top].reshape(1, -1)
        chosen = torch.nn.functional.linear(row, weight[ids[0]])
        lowest = (chosen.amin(dim=-1, keepdim=True) - 1.0).expand(-1, centroids.vocab_size)
        return lowest.scatter(-1, ids, chosen)
