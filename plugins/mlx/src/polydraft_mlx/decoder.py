"""Run a model of mlx-lm over a ``KvCache``: hidden rows and logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import gemma4_text
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from polydraft.errors import UnsupportedError

from polydraft_mlx.kv_cache import FullCache, KvCache, LayerCache, SlidingCache, block_end

__all__ = ["Decoder", "widened"]

_SPLIT_FROM = 64
"""Rows for which a step more costs less than the layers without KV do."""


class Decoder:
    """A causal language model without mlx-lm's ``generate``.

    Args:
        model: What ``mlx_lm.utils.load_model`` returns.
        name: The model's name, for messages.
        rows: The most tokens that one step runs: k_max + 1.
        fixed: Run exactly ``rows`` tokens in every step, over buffers whose length depends on the position alone.
            Steps are padded with copies of their last token, and split where the length changes. A token's logits then
            have the same bits, however the text was divided into steps.

    Raises:
        UnsupportedError: The state of a layer cannot be rolled back.
    """

    def __init__(self, model: Any, name: str, rows: int, *, fixed: bool = False) -> None:
        self.model = model
        self.language_model = getattr(model, "language_model", model)
        self.rows = rows
        self.fixed = fixed
        self._launches = False
        self.gemma4: Any = self.language_model if isinstance(self.language_model, gemma4_text.Model) else None
        self._windows = [_window(cache, name) for cache in make_prompt_cache(model)]
        if not self._windows:
            raise UnsupportedError(f"{name} has no KV cache.", "Choose a model with attention layers.")
        self._probe()
        # Not while it is probed. A GPU gets a whole step at once: its launches are few, and do not wait.
        self._launches = mx.default_device().type == mx.cpu

    def new_cache(self) -> KvCache:
        """An empty cache."""
        layers: list[LayerCache] = []
        # The last step's; split in two, each padded, it stores up to twice as many. And one that runs ahead.
        spare = 3 * self.rows if self.fixed else self.rows + 1
        for window in self._windows:
            if window is None:
                layers.append(FullCache(self.rows, whole=self.fixed))
            else:
                layers.append(SlidingCache(window, self.rows, spare))
            layers[-1].launches = self._launches
        return KvCache(layers)

    def prefill(
        self, cache: KvCache, token_ids: Sequence[int], chunk: int, between: Callable[[], None] = lambda: None
    ) -> tuple[mx.array | None, mx.array]:
        """Run a prompt in chunks. Each is evaluated before the next, so that memory holds one chunk's activations.

        ``between`` is called between chunks; an exception that it raises ends the prefill.

        Returns:
            The last token's hidden row, as from ``step``, and its logits (1, vocab).
        """
        tokens = mx.array([list(token_ids)])
        last = (len(token_ids) - 1) % chunk + 1
        if self.gemma4 is None or (last >= _SPLIT_FROM and self.gemma4.args.num_kv_shared_layers):
            # The last token runs alone: other models than Gemma 4 apply their head to all rows, and of a chunk without
            # it nothing needs the layers that store no KV, so that MLX never runs them.
            last = 1
        before = len(token_ids) - last
        for start in range(0, before, chunk):
            self._forward(cache, tokens[:, start : min(start + chunk, before)])
            mx.eval(cache.state)
            # MLX would keep the chunk's freed buffers for reuse.
            mx.clear_cache()
            between()
        hidden, logits = self._rows(self._forward(cache, tokens[:, before:]), 1)
        if hidden is not None:
            hidden = mx.contiguous(hidden)  # a view would keep the whole chunk in memory
        return hidden, logits

    def step(self, cache: KvCache, tokens: mx.array) -> tuple[mx.array | None, mx.array]:
        """Run at most ``rows`` tokens, (1, count), after the stored ones, and store their KV. Nothing waits for it.

        Returns:
            Final-normed hidden rows of a Gemma 4, (1, count, hidden_size), else None; and logits with the soft-cap
            applied, (count, vocab).
        """
        if not self.fixed:
            return self._rows(self._forward(cache, tokens), tokens.shape[1])
        hidden: list[mx.array] = []
        logits: list[mx.array] = []
        while tokens.shape[1]:
            base, left = cache.length, tokens.shape[1]
            end = block_end(base, self.rows)
            # As many tokens as attend to a buffer of the same length.
            count = next((i for i in range(1, left) if block_end(base + i, self.rows) != end), left)
            padding = mx.repeat(tokens[:, count - 1 : count], self.rows - count, axis=1)
            padded = mx.concatenate([tokens[:, :count], padding], axis=1)
            some_hidden, some_logits = self._rows(self._forward(cache, padded), self.rows)
            # The padding's KV was stored, too.
            cache.rollback(base + count)
            logits.append(some_logits[:count])
            if some_hidden is not None:
                hidden.append(some_hidden[:, :count])
            tokens = tokens[:, count:]
        return mx.concatenate(hidden, axis=1) if hidden else None, mx.concatenate(logits)

    def embed(self, token_ids: mx.array) -> mx.array:
        """Scaled input embeddings of a Gemma 4: (*token_ids.shape, hidden_size)."""
        text = self.gemma4.model
        embedded: mx.array = text.embed_tokens(token_ids) * text.embed_scale
        return embedded

    def _forward(self, cache: KvCache, tokens: mx.array) -> mx.array:
        """Hidden rows of a Gemma 4, logits of other models: (1, count, width)."""
        run = self.model if self.gemma4 is None else self.gemma4.model
        output: mx.array = run(tokens, cache=cache.layers)
        return output

    def _rows(self, output: mx.array, count: int) -> tuple[mx.array | None, mx.array]:
        """Hidden rows and logits of the last ``count`` tokens of a forward."""
        # Before Gemma 4's head: logits of a whole chunk would be (chunk, vocab).
        output = output[:, output.shape[1] - count :]
        if self.gemma4 is None:
            return None, output[0]
        return output, self._head(output[0])

    def _head(self, hidden: mx.array) -> mx.array:
        lm = self.gemma4
        logits: mx.array = lm.model.embed_tokens.as_linear(hidden) if lm.tie_word_embeddings else lm.lm_head(hidden)
        if lm.final_logit_softcapping is not None:
            # 0 * logits is 0, but NaN where they are infinite: the cap would hide it from the sampler.
            logits = gemma4_text.logit_softcap(lm.final_logit_softcapping, logits) + logits * 0
        return logits

    def _probe(self) -> None:
        """Find the dtype and number of the logits, the KV bytes per token, and those of the sliding layers.

        The forward is built but never evaluated: shapes and dtypes are known without reading a weight.
        """
        cache = self.new_cache()
        _, logits = self._rows(self._forward(cache, mx.array([[0]])), 1)
        self.dtype = str(logits.dtype).rpartition(".")[2]
        self.vocab_size = int(logits.shape[-1])
        self.kv_bytes_per_token = self.kv_bytes_fixed = 0
        for layer in cache.layers:
            if isinstance(layer, SlidingCache):
                self.kv_bytes_fixed += sum(buffer.nbytes for buffer in layer.state)
            else:
                self.kv_bytes_per_token += sum(buffer.nbytes // buffer.shape[2] for buffer in layer.state)


def widened(row: mx.array, vocab_size: int) -> mx.array:
    """A drafter's logits (1, vocab) cut, or padded with -inf, to the target's number of tokens."""
    lacking = vocab_size - row.shape[1]
    if lacking <= 0:
        return row[:, :vocab_size] if lacking else row
    return mx.pad(row, [(0, 0), (0, lacking)], constant_values=mx.array(-mx.inf, row.dtype))


def _window(cache: Any, name: str) -> int | None:
    """The sliding window of a layer, from the cache that mlx-lm would give it; None: full attention."""
    if type(cache) is KVCache:
        return None
    # keep > 0 pins the first tokens (attention sinks), which ``SlidingCache`` does not.
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise UnsupportedError(
        f"A layer of {name} keeps its state in a {type(cache).__name__}, which this backend cannot roll back.",
        "Choose a model with full and sliding attention only.",
    )
