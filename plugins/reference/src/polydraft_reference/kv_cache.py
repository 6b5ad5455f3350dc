"""The KV cache: one buffer per layer, with a rollback that is exact past a sliding window too."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from polydraft.errors import EngineError

__all__ = ["KVCache", "LayerCache"]

Array = npt.NDArray[Any]


class LayerCache:
    """Keys and values of one layer. Position p lies in slot ``p % capacity``.

    A full-attention layer has a slot for every position. A sliding layer is a ring: a new row overwrites the oldest
    one. In a ring of only ``window`` rows, k drafts would overwrite k rows that are visible again once those drafts
    are rolled back. So it has ``slack`` more rows, and records how far it has ever been written.

    Args:
        window: Rows visible to attention, the newest included; None: all.
        slack: Rows that can be rolled back.
        context_length: Number of positions.
        row_shape: Shape of a key, (heads, head_dim).
        dtype: float32 or float64.
    """

    def __init__(
        self, window: int | None, slack: int, context_length: int, row_shape: tuple[int, int], dtype: npt.DTypeLike
    ) -> None:
        self.window = window
        self.capacity = context_length if window is None else min(window + slack, context_length)
        self.keys: Array = np.zeros((self.capacity, *row_shape), dtype)
        self.values: Array = np.zeros((self.capacity, *row_shape), dtype)
        self.length = 0
        self.written = 0

    def append(self, key: Array, value: Array) -> None:
        """Store the row of position ``length``; both of shape ``row_shape``."""
        slot = self.length % self.capacity
        self.keys[slot], self.values[slot] = key, value
        self.length += 1
        self.written = max(self.written, self.length)

    def visible(self) -> tuple[Array, Array]:
        """Keys and values that the newest stored row attends to, oldest first: (rows, heads, head_dim) each."""
        first, last = self._first_visible(self.length - 1), self.length - 1
        if first // self.capacity == last // self.capacity:  # one piece of the ring: nothing is copied
            piece = slice(first % self.capacity, last % self.capacity + 1)
            return self.keys[piece], self.values[piece]
        slots = np.arange(first, last + 1) % self.capacity
        return self.keys[slots], self.values[slots]

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` rows.

        Raises:
            EngineError: A row that the next token must see has been overwritten.
        """
        if not 0 <= length <= self.length or not self.reaches(length):
            raise EngineError(
                f"A KV cache of {self.length} rows cannot be rolled back to {length}.",
                "Roll back at most max_draft_tokens + 1 rows after a step.",
            )
        self.length = length
        if length == 0:
            self.written = 0

    def reaches(self, length: int) -> bool:
        """Whether it can go back to the first ``length`` rows: whether what the next token sees is still stored."""
        # The ring holds the last ``capacity`` positions that were ever written.
        return length == 0 or self._first_visible(length) >= self.written - self.capacity

    @property
    def num_bytes(self) -> int:
        """Size of its buffers."""
        return self.keys.nbytes + self.values.nbytes

    def copy(self) -> LayerCache:
        """A copy with its own buffers."""
        twin = copy(self)
        twin.keys, twin.values = self.keys.copy(), self.values.copy()
        return twin

    def _first_visible(self, position: int) -> int:
        return 0 if self.window is None else max(0, position + 1 - self.window)


class KVCache:
    """The caches of all layers, which grow and shrink together."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Tokens stored."""
        return self.layers[-1].length

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, in every layer."""
        for layer in self.layers:
            layer.truncate(length)

    def reaches(self, length: int) -> bool:
        """Whether every layer can go back to the first ``length`` tokens."""
        return all(layer.reaches(length) for layer in self.layers)

    def copy(self) -> KVCache:
        """A scratch copy; running tokens on it does not change the original."""
        return KVCache([layer.copy() for layer in self.layers])
