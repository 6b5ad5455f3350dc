"""The toy transformer: a decoder of a few small layers in numpy, run one token at a time.

Every sum is a numpy reduction over one row, never a BLAS call, and a forward runs one row: so a row's bits depend on
its token, its position and the rows before it, and on nothing else: not on how many rows are run together, on threads,
or on where in a buffer they lie. ``exactness="bitwise"`` asks this of an engine. (The arithmetic names no dtype: in
numpy 2 a Python float leaves a float32 array float32.)
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polydraft_reference.config import ModelConfig
from polydraft_reference.kv_cache import KVCache, LayerCache
from polydraft_reference.text_habits import bigram_logits

__all__ = ["LayerWeights", "ReferenceModel"]

Array = npt.NDArray[Any]

ATTENTION_SCALE = 4.0
"""Sharp attention, so that single rows of the KV cache matter."""

EMBEDDING_SCALE = 0.3
"""Small compared with the layers' output: with a tied head, a token would otherwise repeat itself."""

POSITION_SCALE = 0.7
"""Larger, so that the toy rarely falls into a loop, as greedy small models do."""

LOGIT_SCALE = 2.2

_PROJECTIONS = ("query", "key", "value")
_sum = np.add.reduce
"""What ``array.sum`` calls, without the time of getting there: rows are short."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; each matrix has shape (out, in)."""

    projections: Array
    """Of queries, keys and values, one below the other: one product makes all three."""
    output: Array
    up: Array
    down: Array


class ReferenceModel:
    """Weights and forward of a toy. Read-only, so that sequences in several threads can share it.

    Args:
        config: Sizes and seed. Each matrix is drawn from (seed, its name), so models of one seed and width share
            the layers that both have, and a shallower one drafts passably for a deeper one.
        dtype: float32 or float64, of weights, KV cache and logits.
    """

    def __init__(self, config: ModelConfig, dtype: npt.DTypeLike = np.float32) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        width, inner = config.hidden_size, config.intermediate_size
        self.embedding = self._weight("embedding", config.vocab_size, width, scale=EMBEDDING_SCALE)
        self.positions = self._weight("positions", config.max_position_embeddings, width, scale=POSITION_SCALE)
        self.bigrams = self._constant(bigram_logits(config.seed))
        self.layers = [
            LayerWeights(
                projections=self._constant(
                    np.concatenate([self._weight(f"{index}.{name}", width, width) for name in _PROJECTIONS])
                ),
                output=self._weight(f"{index}.output", width, width),
                up=self._weight(f"{index}.up", inner, width),
                down=self._weight(f"{index}.down", width, inner),
            )
            for index in range(len(config.layer_types))
        ]

    def new_cache(self, slack: int) -> KVCache:
        """An empty KV cache from which ``slack`` rows can be rolled back."""
        config = self.config
        heads = config.num_attention_heads
        row = (heads, config.hidden_size // heads)
        windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
        return KVCache([LayerCache(each, slack, config.max_position_embeddings, row, self.dtype) for each in windows])

    def run(self, token_id: int, cache: KVCache) -> Array:
        """Run one token at position ``cache.length``, store its keys and values, and return its hidden state.

        Returns:
            Shape (hidden_size,), before the final norm.
        """
        # A table of absolute positions, added once; there is no rotary embedding.
        hidden: Array = self.embedding[token_id] + self.positions[cache.length]
        for weights, layer_cache in zip(self.layers, cache.layers, strict=True):
            hidden = hidden + self._attention(weights, layer_cache, _rms_norm(hidden))
            hidden = hidden + self._mlp(weights, _rms_norm(hidden))
        return hidden

    def logits(self, hidden: Array, token_id: int) -> Array:
        """Logits of the token after ``token_id``, whose hidden state is given: shape (vocab,)."""
        logits: Array = _matvec(self.embedding, _rms_norm(hidden)) * LOGIT_SCALE + self.bigrams[token_id]
        return logits

    def _attention(self, weights: LayerWeights, cache: LayerCache, hidden: Array) -> Array:
        query, key, value = _matvec(weights.projections, hidden).reshape(3, self.config.num_attention_heads, -1)
        cache.append(key, value)
        keys, values = cache.visible()
        # keys (rows, heads, head_dim) * query (heads, head_dim): scores (rows, heads), softmax over rows.
        scores = _sum(keys * query, axis=-1) * (ATTENTION_SCALE * query.shape[-1] ** -0.5)
        shares = np.exp(scores - np.maximum.reduce(scores, axis=0))
        shares /= _sum(shares, axis=0)
        mixed = _sum(values * shares[:, :, None], axis=0)
        return _matvec(weights.output, mixed.reshape(-1))

    def _mlp(self, weights: LayerWeights, hidden: Array) -> Array:
        return _matvec(weights.down, np.maximum(_matvec(weights.up, hidden), 0))

    def _weight(self, name: str, rows: int, columns: int, scale: float | None = None) -> Array:
        """A matrix (rows, columns) that depends on the seed, its name and its columns; more rows extend it."""
        # RandomState, not Generator: numpy promises its stream never changes, and the weights are the checkpoint.
        random = np.random.RandomState([self.config.seed, zlib.crc32(name.encode())])
        matrix = random.standard_normal((rows, columns)) * (columns**-0.5 if scale is None else scale)
        return self._constant(matrix)

    def _constant(self, array: Array) -> Array:
        """``array`` in the model's dtype, read-only."""
        constant = array.astype(self.dtype)
        constant.flags.writeable = False
        return constant


def _matvec(matrix: Array, vector: Array) -> Array:
    """``matrix @ vector`` as row-wise sums, which have the same bits everywhere."""
    product: Array = _sum(matrix * vector, axis=-1)
    return product


def _rms_norm(vector: Array) -> Array:
    normed: Array = vector / np.sqrt(_sum(vector * vector) / vector.size + 1e-6)
    return normed
