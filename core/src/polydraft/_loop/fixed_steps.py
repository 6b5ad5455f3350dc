"""Check ``exactness="bitwise"`` on a loaded engine: it depends on the machine and the model.

Engines choose kernels by shape and processor, so what holds on one machine may fail on the next. The core runs a text
twice, once with one token per step, as in plain decoding, and once in steps of several of its tokens followed by wrong
drafts, as in speculation, and compares the logits that each token is chosen from bit by bit.
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
"""Tokens of the short prompt."""
_POWER_OF_TWO = 256
"""A length at which engines enlarge their buffers."""
_DISTINCT = 48
"""Distinct tokens of the text."""
_SPANS = 8
"""Spans of k+1 tokens that are compared after each prompt, time permitting; at least one."""


def check_fixed_steps(engine: SteppingEngine, request: LoadRequest, loading_seconds: float) -> str:
    """Compare the logits of single-token steps with those of speculative steps, bit by bit.

    The text is random, with few distinct tokens: in a mixture of experts some tokens of a step then share experts, and
    some do not. Steps are compared after a short prompt, and around the ends of the sliding window and of a buffer:
    first one span at each place, then more, time permitting.

    Args:
        engine: The loaded engine; one sequence at a time is opened.
        request: What was loaded.
        loading_seconds: How long loading took.

    Returns:
        A note on the places that were left out because their prompts alone would exceed the time limit; empty if there
        are none.

    Raises:
        UnsupportedError: Logits differ.
        NonFiniteLogitsError: They are not finite.
    """
    running, k = engine.running, engine.max_draft_tokens
    if k == 0:
        return ""
    limit = max(_LEAST_SECONDS, _SHARE_OF_LOADING * loading_seconds)
    deadline = time.monotonic() + limit
    # Room for all spans after the longest prompt, and for the wrong drafts of the last one.
    starts = _starts(request, running.context_length - (_SPANS + 1) * (k + 1))
    # A fixed seed: the text is the same at every load.
    vocabulary, draw = engine.tokenizer.vocab_size, random.Random(0)
    ids = [draw.randrange(vocabulary) for _ in range(_DISTINCT)]
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
    with closing(RuleSampler(array_ops_of(engine), prompt, running.dtype)) as sampler:
        # Twice, because the first run includes one-time work.
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
            f"{len(same)} tokens have different logits in a step with drafts and in a step of their own.",
            "Use `exactness='standard'`, or another dtype or device.",
        )
    left_out = [str(start) for start in starts if start not in affordable]
    if not left_out:
        return ""
    return f"Bitwise steps were not measured around position {', '.join(left_out)}: their prompts take too long here."


def _starts(request: LoadRequest, most: int) -> list[int]:
    """Prompt lengths, ascending."""
    window = text_config(request.target.config).get("sliding_window")
    # Lengths at which kernels or buffers may change; each prompt below ends two tokens before one.
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
    """Run the next k+1 tokens of the text both ways; yield for each whether its logits are equal."""
    start, end = sequence.length, sequence.length + k + 1
    # The reference: each token in a step by itself, k+1 rows of digests.
    alone = [_bits(sequence.verify([token], sampler, keep_logits=True))[0] for token in text[start:end]]
    sequence.rollback(start)
    at = start
    while at < end:
        # ``right`` tokens of the text, then wrong ones up to k+1: every step has the shape of a speculative one.
        right = min(draw.randint(1, k + 1), end - at)
        wrong = draw.choices(text, k=k + 1 - right)
        found = _bits(sequence.verify([*text[at : at + right], *wrong], sampler, keep_logits=True))
        # Rows of wrong drafts are not compared: plain decoding never gets there.
        yield from (found[row] == alone[at - start + row] for row in range(right))
        at += right
        sequence.rollback(at)


def _bits(step: Step) -> list[bytes]:
    """A digest of each row of logits."""
    assert step.logits is not None  # keep_logits=True
    # 16 bytes per row in place of four per token of the vocabulary.
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in step.logits.numpy()]
