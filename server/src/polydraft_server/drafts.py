"""What speculation did, in the three forms that clients read: OpenAI's usage, vLLM's metrics, and our own chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from polydraft import Chunk, GenerationResult, GenerationStats
from polydraft.contract import Tokenizer

__all__ = ["RoundCounts", "drafts_of", "gives_text_only", "token_text", "usage_of"]


def usage_of(results: Sequence[GenerationResult], prompts: int) -> dict[str, Any]:
    """OpenAI's ``usage`` of a request. What an engine does not report is None.

    Args:
        results: In the order of the choices: all of the first prompt, then those of the next one.
        prompts: Number of prompts.
    """
    stats = GenerationStats.total(result.stats for result in results)
    # A prompt counts once, however many answers it has. The first of them began first: what it reused was there before.
    firsts = GenerationStats.total(result.stats for result in results[:: len(results) // prompts])
    prompt_tokens = firsts.num_prompt_tokens
    accepted, drafted = stats.num_accepted_tokens, stats.num_draft_tokens
    rejected = None if accepted is None or drafted is None else drafted - accepted
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": stats.num_tokens,
        "total_tokens": None if prompt_tokens is None else prompt_tokens + stats.num_tokens,
        "prompt_tokens_details": {"cached_tokens": firsts.num_reused_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": rejected,
        },
    }


class RoundCounts:
    """Counts the rounds of one generation for vLLM's ``metrics.speculative_decoding``."""

    def __init__(self) -> None:
        self._rounds: list[tuple[int, int]] = []

    def count(self, chunk: Chunk) -> None:
        """Add a round, if it had a draft and the engine reports it."""
        if chunk.num_draft_tokens and chunk.num_accepted_tokens is not None:
            self._rounds.append((chunk.num_draft_tokens, chunk.num_accepted_tokens))

    def metrics(self, result: GenerationResult) -> dict[str, Any] | None:
        """The metrics by vLLM's names; None if nothing was drafted, or the engine does not report it."""
        stats = result.stats
        if not stats.num_drafts or stats.accepted_per_position is None:
            return None
        k = result.running.max_draft_tokens
        # Rounds whose drafts were accepted up to each position: at first all, at last none.
        reached = [stats.num_drafts, *stats.accepted_per_position]
        reached += [0] * (k + 2 - len(reached))
        # An engine may count the drafts of a request without telling those of each round.
        rounds = self._rounds if len(self._rounds) == stats.num_drafts else None
        seconds = stats.prefill_seconds
        return {
            "time_to_first_token_ms": None if seconds is None else 1000 * seconds,
            "generation_time_ms": None if stats.decode_seconds is None else 1000 * stats.decode_seconds,
            "tokens_per_second": stats.tokens_per_second,
            "speculative_decoding": {
                "mean_acceptance_length": stats.mean_acceptance_length,
                "draft_acceptance_rate": stats.acceptance_rate,
                "acceptance_histogram": [more - fewer for more, fewer in pairwise(reached)],
                "num_spec_steps": stats.num_drafts,
                "num_accepted_draft_tokens": stats.num_accepted_tokens,
                "num_draft_tokens": stats.num_draft_tokens,
                "num_spec_tokens": k,
                "per_step_accepted": None if rounds is None else [count for _, count in rounds],
                "per_step_drafted": None if rounds is None else [count for count, _ in rounds],
            },
        }


def drafts_of(chunk: Chunk, tokenizer: Tokenizer) -> dict[str, Any]:
    """``choices[].polydraft`` of a chunk: one round. ``docs/serving.md`` describes it."""
    drafts = None
    if chunk.draft_token_ids is not None:
        accepted = chunk.num_accepted_tokens or 0
        drafts = [
            {"id": token_id, "text": token_text(tokenizer, token_id), "accepted": at < accepted}
            for at, token_id in enumerate(chunk.draft_token_ids)
        ]
    return {
        "token_ids": None if gives_text_only(tokenizer) else chunk.token_ids,
        "num_draft_tokens": chunk.num_draft_tokens,
        "num_accepted_tokens": chunk.num_accepted_tokens,
        "drafts": drafts,
        "segments": [{"text": one.text, "draft": one.is_draft} for one in chunk.segments],
    }


def gives_text_only(tokenizer: Tokenizer) -> bool:
    """Whether the engine gives text without tokens, so that ids are characters (``polydraft.text.text_only``)."""
    return bool(getattr(tokenizer, "text_only", False))


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; U+FFFD stands for bytes of an unfinished character."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
