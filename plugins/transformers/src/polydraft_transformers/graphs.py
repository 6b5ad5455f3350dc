"""Steps captured as CUDA graphs: one launch in place of hundreds, since launches are what bounds small steps on a GPU.

A step can be captured if its shapes are static and all its values lie on the device. ``benchmarks/`` measures the gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Captured"]

_WARM_UPS = 2


class Captured:
    """A function of tensors, captured once, then replayed.

    Args:
        function: Takes the tensors of ``inputs`` and returns tensors. It is run a few times before it is captured, so
            running it again must change nothing.
        inputs: The first call's; later ones have the same shapes and dtypes.
        neighbour: A capture whose memory pool this one shares: the two never run at the same time.
    """

    def __init__(
        self,
        function: Callable[..., tuple[torch.Tensor, ...]],
        inputs: Sequence[torch.Tensor],
        neighbour: Captured | None = None,
    ) -> None:
        self._inputs = [given.clone() for given in inputs]
        device = inputs[0].device.index or 0
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Libraries initialise themselves in their first calls, which must not be captured.
            for _ in range(_WARM_UPS):
                function(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        pool: Any = None if neighbour is None else neighbour._graph.pool()
        self._graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Replay. The tensors returned are overwritten by the next call."""
        for own, given in zip(self._inputs, inputs, strict=True):
            # The graph reads from fixed addresses.
            if own is not given:
                own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs
