"""Gemma 4's MTP drafter ("assistant"): it attends to the target's KV and has none of its own.

Protocol: ``SinglePositionMultiTokenCandidateGenerator`` in Transformers' generation/candidate_generator.py. To draft
after the newest token x at position p: input = concat(target embedding of x, h), where h is the target's final-normed
hidden row of position p-1; position p for all steps of the round; K/V = the target's for positions before p. Each step
gives logits and the h of the next step. Unlike upstream no K/V row of a rejected draft is ever seen.
"""

from __future__ import annotations

from typing import Any

import torch
from polydraft.contract import Sampler
from polydraft.errors import UnsupportedError
from torch.nn import functional

from polydraft_transformers.blocks import Block, draft_block
from polydraft_transformers.decoder import Decoder
from polydraft_transformers.gemma4 import Gemma4Network, is_gemma4
from polydraft_transformers.graphs import Captured
from polydraft_transformers.kv_cache import KvCache

__all__ = ["MtpDrafter"]


class MtpDrafter:
    """A loaded assistant for one target.

    Args:
        assistant: ``Gemma4AssistantForCausalLM`` or its unified twin.
        target: The target it drafts for.

    Raises:
        UnsupportedError: The assistant's layers are of an unknown architecture.
    """

    def __init__(self, assistant: Any, target: Decoder) -> None:
        if not is_gemma4(assistant.model):
            raise UnsupportedError(
                f"Drafters with layers of kind {type(assistant.model).__name__} are not known.",
                "Choose a Gemma 4 assistant, or drafter='ngram'.",
            )
        self.assistant = assistant
        self._target = target
        shared = int(getattr(target.config, "num_kv_shared_layers", 0) or 0)
        owners = target.layer_types[: len(target.layer_types) - shared]
        sources = {kind: max(i for i, other in enumerate(owners) if other == kind) for kind in set(owners)}
        self._network = Gemma4Network(assistant.model, sources)

    def propose(
        self, cache: KvCache, hidden: torch.Tensor, newest: int, k: int, sampler: Sampler, *, keep_logits: bool
    ) -> tuple[list[int], torch.Tensor | None]:
        """Draft k tokens after ``newest``.

        Args:
            cache: The target's; its ``length`` is the position of ``newest``.
            hidden: The target's hidden row before it, shape (1, hidden_size).
            newest: The newest token.
            k: At least 1.
            sampler: Chooses the drafts.
            keep_logits: Whether to return the logits, shape (k, vocab).
        """
        position = cache.length
        device = hidden.device
        at = torch.tensor([position], device=device)
        token = torch.tensor([newest], device=device)
        captured = self._captured(cache, token, hidden, at) if self._target.captures else None
        context = self._context(cache, at, position, all_seen=True) if captured is None else None
        drafts: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        known = [newest]
        for index in range(k):
            if captured is not None:
                logits, hidden = captured(token, hidden, at)
            else:
                logits, hidden = self._step(cache, token, hidden, context)
            token = sampler.choose_draft(logits, position + 1 + index, known if sampler.needs_prefix else None)
            drafts.append(token)
            if sampler.needs_prefix:
                known.append(int(token))
            if keep_logits:
                kept.append(logits.clone())
        return torch.cat(drafts).tolist(), torch.cat(kept) if kept else None

    def _context(
        self, cache: KvCache, at: torch.Tensor, span: int, *, all_seen: bool
    ) -> tuple[Block, dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor | None]]:
        """What all steps of a round share: positions, rotations and masks."""
        target = self._target
        block = draft_block(at, span, target.ring, target.window, target.dtype, all_seen=all_seen)
        cache.begin(block, 0)
        return block, self._network.ropes(at, target.dtype), self._network.masks(block, cache)

    def _step(
        self, cache: KvCache, token: torch.Tensor, hidden: torch.Tensor, context: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft: logits (1, vocab) and the next h (1, hidden_size of the target)."""
        block, ropes, masks = context
        joined = torch.cat([self._target.embed(token), hidden], dim=-1)
        inputs = functional.linear(joined, self.assistant.pre_projection.weight)
        row = self._network.layers(inputs, None, ropes, masks, block, cache)
        return self._head(row), functional.linear(row, self.assistant.post_projection.weight)

    def _captured(self, cache: KvCache, token: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> Captured:
        span = self._target.bucket(cache.length)
        cache.reserve(span)

        def draft(token: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self._step(cache, token, hidden, self._context(cache, at, span, all_seen=False))

        return cache.captured(("draft", span), draft, token, hidden, at)

    def _head(self, row: torch.Tensor) -> torch.Tensor:
        """Logits of a hidden row (1, hidden_size of the drafter)."""
        centroids = self.assistant.masked_embedding
        weight = self.assistant.lm_head.weight
        if centroids is None:
            return functional.linear(row, weight)
        # Only the tokens of the best clusters get logits of their own; the others one below the smallest of these
        # (Gemma4AssistantMaskedEmbedder), computed without waiting for the device.
        scores = functional.linear(row, centroids.centroids.weight)
        top = scores.topk(centroids.centroid_intermediate_top_k, dim=-1).indices[0]
        ids = centroids.token_ordering.view(centroids.num_centroids, -1)[top].view(1, -1)
        chosen = functional.linear(row, weight[ids[0]])
        lowest = (chosen.amin(dim=-1, keepdim=True) - 1.0).expand(-1, centroids.vocab_size)
        return lowest.scatter(-1, ids, chosen)
