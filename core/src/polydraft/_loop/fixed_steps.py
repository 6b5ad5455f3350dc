"""Does this engine keep the promise of ``exactness="bitwise"``, here and with this model? Measured when it is loaded.

Kernels are chosen by shape, and each processor has its own: what held on one may fail on the next. So the core runs a
text once with one token per step, as plain decoding does, and once as speculation does, in steps that hold several of
its tokens with wrong drafts behind them, and compares the bits of the logits that each token is chosen from.
"""

from __future__ import annotations

import hashlib
import random
import time
from contextlib import closing
from typing import TYPE_CHECKING

from polydraft.checkpoints.config import text_config
from polydraft.contract.requests import GenerationSettings, TokenRequest
from polydraft.errors import UnsupportedError
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import array_ops_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft.contract.requests import LoadRequest
    from polydraft.contract.stepping import EngineSequence, Sampler, Step, SteppingEngine

__all__ = ["check_fixed_steps"]

_LEAST_SECONDS, _SHARE_OF_LOADING = 1.0, 0.2
"""Time limit of the check: this many seconds, or this share of the time that loading took, whichever is longer."""
_PROMPT = 12
_POWER_OF_TWO = 256
"""Engines let buffers grow at powers of two."""
_DIFFERENT = 48
"""Different tokens of the text."""
_SPANS = 8
"""Spans of k+1 tokens that are compared from each start on, as far as the time allows; one in any case."""


def check_fixed_steps(engine: SteppingEngine, request: LoadRequest, loading_seconds: float) -> str:
    """Compare the logits of steps of one token with those of steps as speculation makes them, bit by bit.

    The text is random, of a few different tokens: in a mixture of experts some of a step's tokens choose the same
    experts, and some others. It is compared after a short prompt, and around the ends of the sliding window and of a
    buffer: first a few tokens at each of these places, then more, as far as the time allows.

    Args:
        engine: The loaded engine; one sequence at a time is opened.
        request: What was loaded.
        loading_seconds: How long loading took.

    Returns:
        A note: which places were left out, since their prompts alone would have taken longer than the time limit. May
        be empty.

    Raises:
        UnsupportedError: Some logits differ.
    """
    running, k = engine.running, engine.max_draft_tokens
    if k == 0:
        return ""
    limit = max(_LEAST_SECONDS, _SHARE_OF_LOADING * loading_seconds)
    deadline = time.monotonic() + limit
    starts = _starts(request, running.context_length - (_SPANS + 1) * (k + 1))
    vocabulary, draw = engine.tokenizer.vocab_size, random.Random(0)
    ids = [draw.randrange(vocabulary) for _ in range(_DIFFERENT)]
    text = draw.choices(ids, k=max(starts) + _SPANS * (k + 1))
    prompt = TokenRequest(
        prompt_token_ids=tuple(text[:1]),
        settings=GenerationSettings(temperature=0.0),
        seed=0,
        speculate=False,
        num_speculative_tokens=0,
        eos_token_ids=frozenset(),
        max_total_tokens=running.context_length,
    )
    same: list[bool] = []
    with closing(RuleSampler(array_ops_of(engine), prompt)) as sampler:
        # Twice, since an engine does some things only once.
        seconds = min(_prefill_seconds(engine, text[: starts[0]], sampler) for _ in range(2)) / starts[0]
        affordable = [start for start in starts if start == starts[0] or start * seconds < limit]
        for spans in (1, _SPANS - 1):
            for start in affordable:
                if spans > 1 and time.monotonic() + start * seconds > deadline:
                    break
                with closing(engine.open_sequence()) as sequence:
                    sequence.prefill(text[:start], sampler)
                    for _ in range(spans):
                        same += _span(sequence, text, k, sampler, draw)
                        if time.monotonic() > deadline:
                            break
    if not all(same):
        raise UnsupportedError(
            f"`exactness='bitwise'` does not hold on {running.device} in {running.dtype}: {same.count(False)} of "
            f"{len(same)} tokens have other logits in a step with drafts than in a step of their own.",
            "Use `exactness='standard'`, or another dtype or device.",
        )
    left_out = [str(start) for start in starts if start not in affordable]
    if not left_out:
        return ""
    return f"Bitwise steps were not measured around position {', '.join(left_out)}: their prompts take too long here."


def _starts(request: LoadRequest, most: int) -> list[int]:
    """Prompt lengths, rising."""
    window = text_config(request.target.config).get("sliding_window")
    edges = [_POWER_OF_TWO, *([window, 2 * window] if isinstance(window, int) and window > 0 else [])]
    first = max(1, min(_PROMPT, most))
    return [first, *sorted({edge - 2 for edge in edges if _PROMPT < edge - 2 <= most})]


def _prefill_seconds(engine: SteppingEngine, token_ids: Sequence[int], sampler: Sampler) -> float:
    began = time.monotonic()
    with closing(engine.open_sequence()) as sequence:
        sequence.prefill(token_ids, sampler)
    return time.monotonic() - began


def _span(
    sequence: EngineSequence, text: Sequence[int], k: int, sampler: Sampler, draw: random.Random
) -> Iterator[bool]:
    """Run the next k+1 tokens of the text both ways: whether each has the same logits."""
    start, end = sequence.length, sequence.length + k + 1
    alone = [_bits(sequence.verify([token], sampler, keep_logits=True))[0] for token in text[start:end]]
    sequence.rollback(start)
    at = start
    while at < end:
        right = min(draw.randint(1, k + 1), end - at)
        wrong = draw.choices(text, k=k + 1 - right)
        found = _bits(sequence.verify([*text[at : at + right], *wrong], sampler, keep_logits=True))
        yield from (found[row] == alone[at - start + row] for row in range(right))
        at += right
        sequence.rollback(at)


def _bits(step: Step) -> list[bytes]:
    """A digest of each row of logits."""
    assert step.logits is not None  # it was asked to keep them
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in step.logits.numpy()]
