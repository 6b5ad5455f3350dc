"""Translate polydraft's settings for vLLM, in process and over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from polydraft.contract import TokenLogprobs
from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract import GenerationSettings, TokenRequest

__all__ = ["PLAIN_FLAG", "check_settings", "room_of", "seed_of", "token_logprobs"]

PLAIN_FLAG = "polydraft_plain"
"""Key of ``SamplingParams.extra_args`` (a server's ``vllm_xargs``): true for a request to be decoded without drafts."""
_LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this (sampling_params.py, _MAX_TEMP)."""
_LARGEST_TEMPERATURE = 2.0
"""vLLM refuses higher ones (sampling_params.py, _verify_args)."""


def seed_of(request: TokenRequest) -> int:
    """The engine's seed of a request: its seed, and for further noise streams a hash of seed and stream."""
    if request.stream == 0:
        return request.seed
    digest = hashlib.blake2b(f"{request.seed}:{request.stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def room_of(request: TokenRequest) -> int:
    """Tokens that the context has left for the output."""
    return request.max_total_tokens - len(request.prompt_token_ids)


def check_settings(settings: GenerationSettings, *, speculates: bool) -> None:
    """Refuse values that vLLM would silently change, or refuse itself once it has the request.

    Args:
        settings: The call's.
        speculates: Whether the engine was loaded with a drafter.

    Raises:
        UnsupportedError: The temperature is above 0 and below 0.01, or above 2; or ``min_p`` meets a drafter.
    """
    if settings.temperature > _LARGEST_TEMPERATURE:
        raise UnsupportedError(
            f"temperature={settings.temperature} is above {_LARGEST_TEMPERATURE:g}, the highest that vLLM supports.",
            f"Give at most {_LARGEST_TEMPERATURE:g}.",
        )
    if 0 < settings.temperature < _LEAST_TEMPERATURE:
        raise UnsupportedError(
            f"vLLM would raise the temperature from {settings.temperature} to {_LEAST_TEMPERATURE}.",
            f"Give 0 (greedy) or at least {_LEAST_TEMPERATURE}.",
        )
    if settings.min_p and speculates:
        raise UnsupportedError(
            "vLLM does not support min_p in an engine that speculates.", "Leave it out, or load with drafter=None."
        )


def token_logprobs(token_id: int, logprob: float, found: Iterable[tuple[int, float]], count: int) -> TokenLogprobs:
    """One position's log-probabilities: those of vLLM, sorted and cut to ``count``.

    Args:
        token_id: The chosen token.
        logprob: Its log-probability.
        found: Token id and log-probability of the best tokens, and perhaps of the chosen one.
        count: How many of them were asked for.
    """
    best = sorted(found, key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(best[:count]))
