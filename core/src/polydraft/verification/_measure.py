"""The verdict on two outputs of a session, measured by logits, by log-probabilities, or not at all."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from polydraft._workers.engine import WorkerEngine
from polydraft.contract.requests import DEFAULT_SETTINGS, TokenRequest
from polydraft.contract.stepping import SteppingEngine
from polydraft.errors import UnsupportedError
from polydraft.verification._logprobs import tie_from_logprobs
from polydraft.verification._steps import measure_tie
from polydraft.verification._verdict import Tie, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polydraft._session.session import Session
    from polydraft.contract.records import Capabilities
    from polydraft.contract.requests import GenerationSettings
    from polydraft.verification._verdict import Judgement

__all__ = ["judge_outputs", "repeats_seeds"]

_CHANGE_CHOICES = (
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "forced_token_ids",
    "logits_processor",
)
"""With these a token is chosen by other numbers than the log-probabilities that an engine reports."""


def repeats_seeds(capabilities: Capabilities) -> bool:
    """Whether a sample must be the same tokens with and without speculation."""
    return capabilities.seed_identical and {"temperature", "seed"} <= capabilities.sampling


def judge_outputs(
    session: Session,
    capabilities: Capabilities,
    prompt_token_ids: Sequence[int],
    settings: GenerationSettings,
    expected: Sequence[int],
    found: Sequence[int],
    *,
    reused: int = 0,
    stepped: Sequence[tuple[int, int]] = (),
    rounds: Sequence[int] = (),
) -> Judgement:
    """Judge two outputs of a session: what the conformance suite, ``polydraft verify`` and ``--compare`` call.

    Args:
        session: The session that made both outputs.
        capabilities: Its backend's.
        prompt_token_ids: The prompt.
        settings: Of both outputs, as they took effect: the seed among them, ``max_new_tokens`` not looked at.
        expected: The plain output, or the part of it that is compared.
        found: The output that must equal it.
        reused: Leading tokens of the prompt whose KV one of the two took over from an earlier turn.
        stepped: The spans of these, start and end, that decoding steps had computed; in order, empty: not known.
        rounds: How many tokens each round of ``found`` gave, the prefill's first; empty: not known.
    """

    def measure(position: int) -> Tie | str:
        running = session.running
        if running.exactness == "bitwise":
            return "`exactness='bitwise'` promises equal bits: near ties do not count."
        engine = session.engine
        by_logits: Callable[..., Any] | None = None
        if isinstance(engine, WorkerEngine):
            by_logits = engine.measure_tie if engine.shows_logits else None
        elif isinstance(engine, SteppingEngine) and capabilities.exposes_logits:
            by_logits = partial(measure_tie, engine)
        if by_logits is not None:
            request = TokenRequest(
                prompt_token_ids=tuple(prompt_token_ids),
                settings=settings,
                seed=settings.seed or 0,
                speculate=False,
                num_speculative_tokens=0,
                eos_token_ids=frozenset() if settings.ignore_eos else session.tokenizer.eos_token_ids,
                max_total_tokens=running.context_length,
            )
            session.forget_prefixes()
            tie = by_logits(
                request,
                expected=list(expected),
                found=list(found),
                position=position,
                k=running.max_draft_tokens,
                precision=running.precision,
                experts=running.has_experts,
                reused=reused,
                stepped=[list(span) for span in stepped],
                rounds=list(rounds),
            )
            return Tie.model_validate(tie)
        if "logprobs" not in capabilities.sampling:
            return "The engine shows neither logits nor log-probabilities, so a near tie cannot be claimed."
        if not _by_logprobs(settings):
            return "With these settings tokens are not chosen by the log-probabilities that the engine reports."
        try:
            return tie_from_logprobs(session, prompt_token_ids, expected, found, position, settings=settings)
        except UnsupportedError as error:
            return f"The engine does not show all log-probabilities: {error}"

    return judge(
        expected, found, measure, unit="character" if getattr(session.tokenizer, "text_only", False) else "token"
    )


def _by_logprobs(settings: GenerationSettings) -> bool:
    """Whether the token of the largest log-probability is chosen, of those that may come."""
    return all(getattr(settings, name) == getattr(DEFAULT_SETTINGS, name) for name in _CHANGE_CHOICES)
