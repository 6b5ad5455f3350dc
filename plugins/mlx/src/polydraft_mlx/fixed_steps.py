"""Does this device give a token the same bits in every row of a step? Asked of it when ``bitwise`` is loaded.

Measured on CPUs (mlx 0.32.4; float32, bfloat16, quantized): always. Other devices have other kernels, so each session
finds out on its own model before it promises anything.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from polydraft.errors import UnsupportedError

from polydraft_mlx.decoder import Decoder

__all__ = ["check_fixed_steps"]

_PROMPT = 16


def check_fixed_steps(target: Decoder, device: str) -> None:
    """Run the same tokens one a step, and all in one step, and compare the logits' bits. Takes ``rows`` + 1 steps.

    Raises:
        UnsupportedError: They differ.
    """
    rows = target.rows
    text = [(7 * index + 3) % target.vocab_size for index in range(_PROMPT + rows)]
    found = []
    for size in (1, rows):
        cache = target.new_cache()
        target.prefill(cache, text[:_PROMPT], _PROMPT)
        steps = [
            target.step(cache, mx.array([text[start : start + size]]))[1]
            for start in range(_PROMPT, _PROMPT + rows, size)
        ]
        found.append(mx.concatenate(steps).astype(mx.float32).view(mx.uint32))
    different: Any = (found[0] != found[1]).any(axis=-1).sum().item()
    if different:
        raise UnsupportedError(
            f"exactness='bitwise' does not hold on {device}: {different} of {rows} tokens have other logits in another "
            f"row of a step of {rows}.",
            "Use exactness='standard', in float32 where near ties matter.",
        )
