"""A causal language model run over a ``KvCache``: hidden rows and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from polydraft.errors import UnsupportedError

from polydraft_transformers.kv_cache import KvCache
from polydraft_transformers.masks import block_mask

__all__ = ["Decoder"]

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class Decoder:
    """The text model and head of a checkpoint, without ``generate``.

    Args:
        model: ``...ForCausalLM``, or ``...ForConditionalGeneration`` whose text part is used.
        slack: Tokens that a rollback may take back.

    Raises:
        UnsupportedError: Layers of a kind whose state this cache does not keep.
    """

    def __init__(self, model: Any, slack: int) -> None:
        self.model = model
        self.text_model = getattr(model.model, "language_model", model.model)
        self.config = model.config.get_text_config()
        self.lm_head = model.lm_head
        self.slack = slack
        self.device: torch.device = self.lm_head.weight.device
        self.dtype: torch.dtype = self.lm_head.weight.dtype
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.layer_types = self._layer_types()
        self.window: int | None = int(self.config.sliding_window) if "sliding_attention" in self.layer_types else None
        self.windows = [self.window if kind == "sliding_attention" else None for kind in self.layer_types]
        self._mixed = self.window is not None

    def _layer_types(self) -> list[str]:
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            if getattr(self.config, "sliding_window", None) and getattr(self.config, "use_sliding_window", True):
                raise UnsupportedError(
                    f"Models of type {self.config.model_type} with a sliding window in every layer are not tried yet.",
                    "Choose a Gemma 4, Llama or Qwen3 model.",
                )
            kinds = ["full_attention"] * self.config.num_hidden_layers
        unknown = set(kinds) - _KNOWN_LAYERS
        if unknown:
            raise UnsupportedError(
                f"Layers of kind {', '.join(sorted(unknown))} keep a state that cannot be rolled back here.",
                "Choose a model with full and sliding attention only.",
            )
        return list(kinds)

    def new_cache(self) -> KvCache:
        """An empty cache."""
        return KvCache(self.windows, self.slack)

    def forward(self, cache: KvCache, token_ids: Sequence[int]) -> torch.Tensor:
        """Run tokens after the stored ones; stores their KV.

        Returns:
            Final-normed hidden rows, shape (1, len(token_ids), hidden_size).
        """
        count, stored = len(token_ids), cache.length
        inputs = torch.tensor([list(token_ids)], device=self.device)
        positions = torch.arange(stored, stored + count, device=self.device)[None]
        full = block_mask(stored, count, None, self.device)
        masks: Any = full
        if self._mixed:
            masks = {"full_attention": full, "sliding_attention": block_mask(stored, count, self.window, self.device)}
        elif full is None:
            # None would make other architectures build a mask of their own from a cache of Transformers' kind.
            masks = torch.ones((1, 1, 1, stored + 1), dtype=torch.bool, device=self.device)
        output = self.text_model(
            input_ids=inputs, position_ids=positions, attention_mask=masks, past_key_values=cache, use_cache=True
        )
        cache.advance(count)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden rows (rows, hidden_size), soft-cap applied: (rows, vocab)."""
        logits: torch.Tensor = self.lm_head(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings, scaled as the model scales them; shape (*token_ids.shape, hidden_size)."""
        embedded: torch.Tensor = self.text_model.embed_tokens(token_ids)
        return embedded
