"""Translate polydraft's settings for vLLM, in process and over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from polydraft.contract import TokenLogprobs
from polydraft.errors import UnsupportedError
from polydraft.sampling.structured import check_guided, lark_of

if TYPE_CHECKING:
    from polydraft.contract import GenerationSettings, TokenRequest

__all__ = ["PLAIN_FLAG", "check_settings", "sampling_values", "token_logprobs"]

PLAIN_FLAG = "polydraft_plain"
"""Key of ``SamplingParams.extra_args`` (a server's ``vllm_xargs``): true for a request to be decoded without drafts."""
_LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this (sampling_params.py, _MAX_TEMP)."""
_LARGEST_TEMPERATURE = 2.0
"""vLLM refuses higher ones (sampling_params.py, _verify_args)."""


def sampling_values(request: TokenRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request's settings by vLLM's names: those that OpenAI's API has too, and vLLM's further ones.

    The core finds stop strings; vLLM gets the ids that end the output.
    """
    settings = request.settings
    room = request.max_total_tokens - len(request.prompt_token_ids)  # tokens that the context has left for the output
    common = settings.model_dump(include={"temperature", "top_p", "presence_penalty", "frequency_penalty"})
    common["max_tokens"] = min(settings.max_new_tokens, room)
    if settings.temperature:
        common["seed"] = _seed(request)
    if settings.logprobs is not None:
        common["logprobs"] = settings.logprobs
    further = {
        **settings.model_dump(include={"top_k", "min_p", "repetition_penalty"}),
        "min_tokens": min(settings.min_new_tokens, room),
        "ignore_eos": True,  # vLLM's own list may differ from the request's
        "stop_token_ids": sorted(request.eos_token_ids | set(settings.stop_token_ids)),
    }
    if settings.guided is not None:
        further["structured_outputs"] = {"grammar": lark_of(settings.guided)}
    return common, further


def _seed(request: TokenRequest) -> int:
    """The engine's seed of a request: its seed, and for further noise streams a hash of seed and stream."""
    if request.stream == 0:
        return request.seed
    digest = hashlib.blake2b(f"{request.seed}:{request.stream}".encode(), digest_size=8).digest()
    # 63 bits, so that the seed fits into a signed 64-bit field.
    return int.from_bytes(digest, "big") >> 1


def check_settings(settings: GenerationSettings, *, speculates: bool) -> None:
    """Refuse values that vLLM would silently change, or refuse itself once it has the request.

    Raises:
        UnsupportedError: The temperature is above 0 and below 0.01, or above 2; ``min_p`` meets a drafter; or
            ``guided`` meets ``min_new_tokens``, or is a grammar that follows a thought.
        InvalidRequestError: llguidance cannot read ``guided``.
    """
    if settings.temperature > _LARGEST_TEMPERATURE:
        raise UnsupportedError(
            f"`temperature={settings.temperature}` is above {_LARGEST_TEMPERATURE:g}, the highest that vLLM supports.",
            f"Give at most {_LARGEST_TEMPERATURE:g}.",
        )
    if 0 < settings.temperature < _LEAST_TEMPERATURE:
        raise UnsupportedError(
            f"vLLM would raise the temperature from {settings.temperature} to {_LEAST_TEMPERATURE}.",
            f"Give 0 (greedy) or at least {_LEAST_TEMPERATURE}.",
        )
    if settings.min_p and speculates:
        raise UnsupportedError(
            "vLLM does not support `min_p` in an engine that speculates.", "Leave it out, or load with `drafter=None`."
        )
    if settings.guided is None:
        return
    if settings.min_new_tokens:
        raise UnsupportedError(
            "vLLM suppresses the end of the output until `min_new_tokens`, even where `guided` allows nothing else.",
            "Leave `min_new_tokens` out.",
        )
    check_guided(settings.guided)
    if lark_of(settings.guided) is None:
        raise UnsupportedError(
            "vLLM takes one grammar, and this one would come after a thought.",
            "Turn thinking off in `chat_template_kwargs`, or use a backend whose logits are read here.",
        )


def token_logprobs(token_id: int, logprob: float, found: Iterable[tuple[int, float]], count: int) -> TokenLogprobs:
    """The chosen token's log-probability, and the best ``count`` of those that vLLM ``found`` (perhaps one more)."""
    # Equal values in the order of their ids.
    best = sorted(found, key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(best[:count]))
