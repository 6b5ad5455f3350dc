"""How polydraft's settings are said to vLLM, in process and to a server alike."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract import GenerationSettings, TokenRequest

__all__ = ["PLAIN_FLAG", "check_temperature", "seed_of"]

PLAIN_FLAG = "polydraft_plain"
"""Key of ``SamplingParams.extra_args`` (a server's ``vllm_xargs``): true for a request to be decoded plainly."""
_LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this (sampling_params.py, _MAX_TEMP)."""
_LARGEST_TEMPERATURE = 2.0
"""vLLM takes no higher one (sampling_params.py, _verify_args)."""


def seed_of(request: TokenRequest) -> int:
    """The engine's seed of a request: its seed, and for further noise streams a hash of seed and stream."""
    if request.stream == 0:
        return request.seed
    digest = hashlib.blake2b(f"{request.seed}:{request.stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_temperature(settings: GenerationSettings) -> None:
    """Refuse temperatures that vLLM would silently change, or refuse itself once the request is there.

    Raises:
        UnsupportedError: It is above 0 and below 0.01, or above 2.
    """
    if settings.temperature > _LARGEST_TEMPERATURE:
        raise UnsupportedError(
            f"The temperature is {settings.temperature}, and vLLM takes at most {_LARGEST_TEMPERATURE:g}.",
            f"Give at most {_LARGEST_TEMPERATURE:g}.",
        )
    if 0 < settings.temperature < _LEAST_TEMPERATURE:
        raise UnsupportedError(
            f"vLLM raises the temperature {settings.temperature} to {_LEAST_TEMPERATURE}.",
            f"Give 0 (greedy) or at least {_LEAST_TEMPERATURE}.",
        )
