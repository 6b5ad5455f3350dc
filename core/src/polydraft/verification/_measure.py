"""Which way a near tie is measured: by logits, by log-probabilities, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract.requests import DEFAULT_SETTINGS, TokenRequest
from polydraft.contract.stepping import SteppingEngine
from polydraft.verification._logprobs import tie_from_logprobs
from polydraft.verification._steps import measure_tie

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft._session.session import Session
    from polydraft.contract.records import Capabilities
    from polydraft.contract.requests import GenerationSettings
    from polydraft.contract.results import GenerationResult
    from polydraft.verification._verdict import Tie

__all__ = ["measure", "repeats_seeds"]

_CHANGE_CHOICES = (
    "min_new_tokens",
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "banned_token_ids",
    "forced_token_ids",
    "logits_processor",
)
"""With these a token is chosen by other numbers than the log-probabilities that an engine reports."""


def repeats_seeds(capabilities: Capabilities) -> bool:
    """Whether a sample must be the same tokens with and without speculation."""
    return capabilities.seed_identical and {"temperature", "seed"} <= capabilities.sampling


def measure(
    session: Session,
    capabilities: Capabilities,
    plain: GenerationResult,
    expected: Sequence[int],
    found: Sequence[int],
    position: int,
) -> Tie | None:
    """Measure how nearly tied two tokens are, for ``judge``.

    Args:
        session: The session that made both outputs.
        capabilities: Its backend's.
        plain: The result of plain decoding: its prompt and effective settings count, the seed among them.
        expected: The plain output, or the part of it that is compared.
        found: The other output.
        position: Index of the first token that differs; both have one there.

    Returns:
        None where the engine shows no numbers that the choice was made by, or plain decoding does not repeat itself.
    """
    running, settings = session.running, plain.settings
    if isinstance(session.engine, SteppingEngine) and capabilities.exposes_logits:
        request = TokenRequest(
            prompt_token_ids=plain.prompt_token_ids,
            settings=settings,
            seed=settings.seed or 0,
            speculate=False,
            num_speculative_tokens=0,
            eos_token_ids=frozenset() if settings.ignore_eos else session.tokenizer.eos_token_ids,
            max_total_tokens=running.context_length,
        )
        k = running.num_speculative_tokens
        return measure_tie(session.engine, request, expected, found, position, k, dtype=running.dtype)
    if "logprobs" in capabilities.sampling and _by_logprobs(settings):
        prompt, ignore_eos = plain.prompt_token_ids, settings.ignore_eos
        return tie_from_logprobs(session, prompt, expected, found, position, ignore_eos=ignore_eos)
    return None


def _by_logprobs(settings: GenerationSettings) -> bool:
    """Whether the token of the largest log-probability is chosen."""
    return all(getattr(settings, name) == getattr(DEFAULT_SETTINGS, name) for name in _CHANGE_CHOICES)
