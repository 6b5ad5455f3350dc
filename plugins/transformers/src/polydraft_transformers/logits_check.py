"""Are our logits Transformers' own? Measured when a pair is loaded, for layers that run through Transformers' code.

Some models scale their logits after the head (Granite, Cohere). Greedy decoding hides that; sampling does not.
"""

from __future__ import annotations

import math
import threading
from contextlib import closing

import torch
from polydraft.errors import NonFiniteLogitsError, UnsupportedError

from polydraft_transformers.decoder import Decoder
from polydraft_transformers.gemma4 import Gemma4Network
from polydraft_transformers.sequence import TransformersSequence

__all__ = ["check_logits"]

_TOKENS = 6
# Relative distances (L2): a scale after the head changes logits by far more than rounding.
_LIMIT = {torch.float32: 0.01}
_LOW_PRECISION_LIMIT = 0.2


def check_logits(decoder: Decoder, *, drafter: bool = False) -> None:
    """Compare the logits of a few tokens with those of the whole module, a target or a ``drafter``.

    Raises:
        UnsupportedError: They differ by more than rounding explains.
        NonFiniteLogitsError: Ours are NaN or infinite: then no comparison is possible.
    """
    if isinstance(decoder.network, Gemma4Network):  # its head is known, and tested
        return
    vocabulary = int(decoder.lm_head.weight.shape[0])
    tokens = [(7 + 31 * index) % vocabulary for index in range(_TOKENS)]
    with closing(TransformersSequence(decoder, _TOKENS, threading.Lock())) as sequence, torch.inference_mode():
        ours = decoder.logits(sequence.run_prompt(tokens))[:, :vocabulary].float()
        theirs = decoder.model(torch.tensor([tokens], device=decoder.device)).logits[0, :, : ours.shape[1]].float()
    for position, largest in enumerate(ours.amax(dim=-1).tolist(), start=1):
        if not math.isfinite(largest):
            dtype = str(decoder.dtype).removeprefix("torch.")
            raise NonFiniteLogitsError.at(largest, position, dtype, drafter=drafter)
    # Single tokens may have -inf in both: inf - inf would be NaN.
    same = torch.isinf(ours) & (ours == theirs)
    ours, theirs = ours.masked_fill(same, 0.0), theirs.masked_fill(same, 0.0)
    difference = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9))
    if not difference <= _LIMIT.get(decoder.dtype, _LOW_PRECISION_LIMIT):
        raise UnsupportedError(
            f"Models of type {decoder.config.model_type} change their logits after the head, which this backend does "
            f"not do: its logits differ by {difference:.0%} from Transformers' own.",
            "Choose a Gemma 4, Llama or Qwen3 model.",
        )
