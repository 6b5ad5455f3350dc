"""The loop of rounds: draft, verify, accept, roll back, emit.

A draft token is accepted while it equals the target's choice at its position (``polydraft.sampling``), so the output
is that of plain decoding, which is the same loop without drafts. This is exact-match verification; for temperature 0 it
is Leviathan et al. 2023 (arXiv:2211.17192), section 2 with argmax; for seeded sampling the noise is shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from polydraft.contract.stepping import PrefillCancelled
from polydraft.errors import EngineError

if TYPE_CHECKING:
    from polydraft._loop.drafting import DraftSource
    from polydraft.contract.results import Round
    from polydraft.contract.stepping import EngineSequence, Sampler
    from polydraft.contract.whole import Generation

__all__ = ["run_rounds"]


def run_rounds(
    sequence: EngineSequence, generation: Generation, sampler: Sampler, drafts: DraftSource | None
) -> Iterator[Round]:
    """Generate until the output ends or the caller cancels.

    The first Round holds the token that prefill chose. After each Round the sequence stores the KV of emitted tokens
    only: of all but the newest, unless the newest was an accepted draft that ended the output.

    Args:
        sequence: An empty sequence of the engine.
        generation: Prompt, limits and k; takes each round's tokens, and says when the output ends.
        sampler: Chooses the target's and the drafter's tokens.
        drafts: None for plain decoding.

    Raises:
        EngineError: The engine returned another number of tokens than it was asked for.
    """
    request = generation.request
    if generation.cancelled():
        return
    sequence.cancelled = generation.cancelled
    try:
        step = sequence.prefill(request.prompt_token_ids, sampler)
    except PrefillCancelled:
        return
    newest = step.token_ids[0]
    if drafts is not None:
        drafts.commit(request.prompt_token_ids)
        drafts.commit((newest,))
    yield generation.emit((newest,), num_draft_tokens=0, num_accepted_tokens=0, logprobs=step.logprobs)
    emitted = 1
    limit = min(request.settings.max_new_tokens, request.max_total_tokens - len(request.prompt_token_ids))
    while generation.finish_reason is None:
        # The bonus token always fits: a draft never reaches past the last token that may be emitted.
        k = min(request.num_speculative_tokens, limit - emitted - 1)
        if generation.cancelled():
            return
        draft = drafts.propose(newest, k) if drafts is not None and k > 0 else []
        if len(draft) > k:
            raise _defect(f"The engine's drafter proposed {len(draft)} tokens; at most {k} were asked for.")
        if generation.cancelled():
            return
        base = sequence.length
        step = sequence.verify([newest, *draft], sampler)
        if len(step.token_ids) != len(draft) + 1:
            raise _defect(f"The engine chose {len(step.token_ids)} tokens for {len(draft) + 1} rows.")
        accepted = 0
        while accepted < len(draft) and draft[accepted] == step.token_ids[accepted]:
            accepted += 1
        emission = generation.emit(
            step.token_ids[: accepted + 1],
            num_draft_tokens=len(draft),
            num_accepted_tokens=accepted,
            logprobs=step.logprobs,
        )
        # The end of the output may have cut accepted drafts off: they leave the sequence, too.
        sequence.rollback(base + 1 + min(accepted, len(emission.token_ids)))
        newest = emission.token_ids[-1]
        emitted += len(emission.token_ids)
        if drafts is not None and generation.finish_reason is None:
            drafts.commit(emission.token_ids)
        yield emission


def _defect(message: str) -> EngineError:
    return EngineError(message, "This is a defect of the backend; report it to its authors.")
