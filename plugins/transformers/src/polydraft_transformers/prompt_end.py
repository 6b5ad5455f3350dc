"""Layers that store no KV, which run for a prompt's last rows alone: on a GPU as one recorded launch.

A prompt's launches are not recorded, as each prompt has another length; where it is short, the GPU waits for the host.
Its last rows are always as many.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from polydraft_transformers.graphs import Captured
from polydraft_transformers.kv_cache import KvCache
from polydraft_transformers.shared_caches import SharedCaches

__all__ = ["PromptEnd"]


class PromptEnd:
    """Runs a model's last layers.

    Args:
        layers: Takes a cache where a step is laid out, its rows, (rows, hidden_size), and if the model has them their
            per-layer inputs, (rows, layers, width); gives final-normed hidden rows.
    """

    def __init__(self, layers: Callable[..., Tensor]) -> None:
        self._layers = layers
        # By number of rows, and size of the rings.
        self._recorded: dict[tuple[int, int], tuple[SharedCaches, Captured] | None] = {}

    def run(self, cache: KvCache, positions: Tensor, slots: Tensor, *rows: Tensor) -> Tensor:
        """Run the rows at these positions and slots, int64, (rows,); ``rows`` as ``layers`` takes them."""
        key = len(positions), cache.ring
        if key not in self._recorded:
            # Recording takes as long as a few prompts: a program that runs one does without.
            self._recorded[key] = None
            return self._run(SharedCaches([cache]), positions, slots, *rows)
        recorded = self._recorded[key]
        if recorded is None:
            shared = SharedCaches([cache])
            captured = Captured(lambda *inputs: (self._run(shared, *inputs),), (positions, slots, *rows))
            self._recorded[key] = recorded = shared, captured
        shared, captured = recorded
        shared.point_at([cache])
        (found,) = captured(positions, slots, *rows)
        return found.clone()  # the next prompt overwrites it

    def _run(self, cache: SharedCaches, positions: Tensor, slots: Tensor, *rows: Tensor) -> Tensor:
        cache.begin_step(positions, slots)
        return self._layers(cache, *rows)
