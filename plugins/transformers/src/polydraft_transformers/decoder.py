"""A causal language model run over a ``KvCache``: prompts in chunks, then steps of a few rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from polydraft.errors import UnsupportedError

from polydraft_transformers.blocks import Block, prefill_block, ring_slots, step_block
from polydraft_transformers.gemma4 import Gemma4Network, is_gemma4
from polydraft_transformers.kv_cache import KvCache

__all__ = ["Decoder"]

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_FIRST_CAPACITY = 256
_KEPT_CACHES = 2
"""Caches of closed sequences kept for the next ones; what was captured over them is kept with them."""


class Network(Protocol):
    """Runs the layers."""

    def run(self, token_ids: torch.Tensor, block: Block, cache: KvCache) -> torch.Tensor:
        """Tokens, shape (rows,), to final-normed hidden rows (rows, hidden_size); stores their KV."""
        ...


class _ModuleNetwork:
    """Any other architecture, through Transformers' own module."""

    def __init__(self, text_model: Any, *, mixed: bool) -> None:
        self._model = text_model
        self._mixed = mixed

    def run(self, token_ids: torch.Tensor, block: Block, cache: KvCache) -> torch.Tensor:
        full = None if block.full_mask is None else block.full_mask[None, None]
        masks: Any = full
        if self._mixed:
            assert block.sliding_mask is not None
            masks = {"full_attention": full, "sliding_attention": block.sliding_mask[None, None]}
        output = self._model(
            input_ids=token_ids[None],
            position_ids=block.positions[None],
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden


class Decoder:
    """The text model and head of a checkpoint, without ``generate``.

    Args:
        model: ``...ForCausalLM``, or ``...ForConditionalGeneration`` whose text part is used.
        step_rows: Rows of a step at most.
        fixed: Whether every step of a session runs ``step_rows`` rows, each token in the row ``position % step_rows``,
            over full-layer buffers whose length depends on the position alone. Kernels may then treat one row otherwise
            than another (the last ones of a tile, the tail of a vector): the same position meets the same treatment.

    Raises:
        UnsupportedError: Layers of a kind whose state this cache does not keep.
    """

    def __init__(self, model: Any, step_rows: int, *, fixed: bool = False) -> None:
        self.model = model
        base = getattr(model, "model", None)
        text_model = getattr(base, "language_model", base)
        self.config = model.config.get_text_config()
        self.lm_head: Any = getattr(model, "lm_head", None)
        if (
            self.lm_head is None
            or text_model is None
            or not hasattr(text_model, "embed_tokens")
            or not hasattr(text_model, "layers")
        ):
            raise UnsupportedError(
                f"Models of type {self.config.model_type} are not built as this backend knows them.",
                "Choose a Gemma 4, Llama or Qwen3 model.",
            )
        self.step_rows = step_rows
        self.fixed = fixed
        self.device: torch.device = self.lm_head.weight.device
        self.dtype: torch.dtype = self.lm_head.weight.dtype
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.layer_types = self._layer_types()
        self.window: int | None = int(self.config.sliding_window) if "sliding_attention" in self.layer_types else None
        self.windows = [self.window if kind == "sliding_attention" else None for kind in self.layer_types]
        self.ring = ring_slots(self.window or 0, step_rows)
        self._embedding = text_model.embed_tokens
        self.network: Network = (
            Gemma4Network(text_model)
            if is_gemma4(text_model)
            else _ModuleNetwork(text_model, mixed=self.window is not None)
        )
        self._pads = _pads(model.config) if text_model is not base and is_gemma4(text_model) else {}
        # Captured is what was tried: Gemma 4's layers, without experts that ask the host what to run.
        self.captures = (
            self.device.type == "cuda"
            and isinstance(self.network, Gemma4Network)
            and getattr(self.config, "_experts_implementation", None) != "eager"
        )
        # No lock: a sequence may be closed by the garbage collector, in the middle of anything.
        self._free: deque[KvCache] = deque(maxlen=_KEPT_CACHES)

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

    def open_cache(self) -> KvCache:
        """An empty cache; one that was given back is used again, with what was captured over its buffers."""
        try:
            cache = self._free.pop()
        except IndexError:
            return KvCache(self.windows, self.ring, spare=self.step_rows)
        cache.clear()
        return cache

    def give_back(self, cache: KvCache) -> None:
        """Take back a cache that is no longer used, and in which no forward failed."""
        self._free.append(cache)

    def kv_bytes(self, tokens: int) -> int:
        """Size of the full layers' KV of so many tokens; layers that share another's have none of their own."""
        text_model = getattr(self.model.model, "language_model", self.model.model)
        rows = 0
        for kind, layer in zip(self.layer_types, text_model.layers, strict=True):
            keys = getattr(getattr(layer, "self_attn", None), "k_proj", None)
            if kind == "full_attention" and keys is not None:
                rows += 2 * int(keys.weight.shape[0])
        return rows * tokens * self.dtype.itemsize

    @staticmethod
    def bucket(position: int) -> int:
        """Slots of a full layer that a captured or fixed step attends to at a position: the next power of two."""
        return max(_FIRST_CAPACITY, 1 << position.bit_length())

    def rows_for(self, count: int) -> int:
        """Rows that a step over ``count`` tokens runs: as few as fit, where shapes may vary."""
        if self.fixed or (self.captures and count > 1):
            return self.step_rows
        return count

    def parts(self, first: int, token_ids: Sequence[int]) -> list[Sequence[int]]:
        """Split a step's tokens where the bucket changes, if a row's bits shall depend on its prefix only."""
        border = self.bucket(first)
        if not self.fixed or first + len(token_ids) <= border:
            return [token_ids]
        return [token_ids[: border - first], token_ids[border - first :]]

    def prefill(self, cache: KvCache, token_ids: Sequence[int]) -> torch.Tensor:
        """Run a chunk of the prompt after the stored tokens: final-normed hidden rows (tokens, hidden_size)."""
        count, stored = len(token_ids), cache.length
        block = prefill_block(stored, count, self.ring, self.window, self.dtype, self.device)
        cache.begin(block, self.bucket(stored + count + self.step_rows))
        hidden = self.network.run(torch.tensor(self._run_as(token_ids), device=self.device), block, cache)
        cache.advance(count)
        return hidden

    def step(
        self, cache: KvCache, token_ids: Sequence[int], rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a few tokens after the stored ones and store their KV.

        Args:
            cache: The sequence's.
            token_ids: At most ``step_rows``.
            rows: Pad to this many rows, with copies of the last token, which need no other experts than it does.

        Returns:
            Final-normed hidden rows (tokens, hidden_size) and logits (tokens, vocab). A captured step overwrites them
            when it runs again.
        """
        count, stored = len(token_ids), cache.length
        rows = max(rows or count, count)
        tokens = self._run_as(token_ids)
        shift = stored % rows if self.fixed else 0
        # Row r runs the token whose index is `order[r]` from the first one on, or a copy of the last token.
        order = [(row - shift) % rows for row in range(rows)]
        inputs = torch.tensor(
            [
                [tokens[min(index, count - 1)] for index in order],
                [stored + min(index, count - 1) for index in order],
                [stored + index for index in order],
                [(shift + index) % rows for index in range(rows)],
            ],
            device=self.device,
        )
        # A cache keeps room for one step more, so that buffers seldom move.
        bucket = self.bucket(stored + count - 1)
        span = bucket if self.fixed or self.captures else stored + count
        if self.captures:
            hidden, logits = self._captured(cache, inputs, span)
        else:
            hidden, logits = self._step(cache, inputs, span)
        cache.advance(count)
        return hidden[:count], logits[:count]

    def _step(self, cache: KvCache, inputs: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the rows of ``inputs`` (tokens, positions, slots, the row of each token in turn; shape (4, rows))."""
        tokens, positions, slots, rows = inputs
        block = step_block(positions, slots, span, self.ring, self.window, self.dtype)
        cache.begin(block, self.bucket(span - 1))
        hidden = self.network.run(tokens, block, cache)
        logits = self.logits(hidden)
        return (hidden[rows], logits[rows]) if self.fixed else (hidden, logits)

    def _captured(self, cache: KvCache, inputs: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        cache.reserve(span)
        key = ("step", inputs.shape[1], span)
        captured = cache.captured(key, lambda given: self._step(cache, given, span), inputs)
        hidden, logits = captured(inputs)
        return hidden, logits

    def _run_as(self, token_ids: Sequence[int]) -> Sequence[int]:
        return [self._pads.get(token_id, token_id) for token_id in token_ids] if self._pads else token_ids

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden rows (rows, hidden_size), soft-cap applied: (rows, vocab)."""
        logits: torch.Tensor = self.lm_head(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Input embeddings, scaled as the model scales them; shape (*token_ids.shape, hidden_size)."""
        embedded: torch.Tensor = self._embedding(token_ids)
        return embedded


def _pads(config: Any) -> dict[int, int]:
    """What ``Gemma4Model`` runs in place of the tokens where images, videos and sounds go: the padding token."""
    pad = config.get_text_config().pad_token_id
    names = ("image_token_id", "video_token_id", "audio_token_id")
    found = (getattr(config, name, None) for name in names)
    return {} if pad is None else {token_id: pad for token_id in found if token_id is not None}
