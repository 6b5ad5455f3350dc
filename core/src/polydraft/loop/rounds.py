"""The loop of rounds: draft, verify, accept, roll back, emit.

A draft token is accepted while it equals the target's choice at its position (``polydraft.sampling``), so the output
is that of plain decoding, which is the same loop without drafts. This is exact-match verification; for temperature 0 it
is Leviathan et al. 2023 (arXiv:2211.17192), section 2 with argmax; for seeded sampling the noise is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from polydraft.contract.results import Round
from polydraft.contract.stepping import PrefillCancelled
from polydraft.errors import EngineError

if TYPE_CHECKING:
    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.stepping import Chooser, EngineSequence
    from polydraft.loop.drafting import DraftSource
    from polydraft.text.tracker import OutputTracker

__all__ = ["run_rounds"]


def run_rounds(
    sequence: EngineSequence,
    request: TokenRequest,
    chooser: Chooser,
    tracker: OutputTracker,
    drafts: DraftSource | None,
    cancelled: Callable[[], bool],
) -> Iterator[Round]:
    """Generate until the tracker says stop or the caller cancels.

    The first Round holds the token that prefill chose. After each Round the sequence stores the KV of emitted tokens
    only, the newest one excluded unless it was an accepted draft that ended the output.

    Args:
        sequence: An empty sequence of the engine.
        request: Prompt, limits and k.
        chooser: Chooses the target's and the drafter's tokens.
        tracker: Told each emitted token in order; says when the generation ends.
        drafts: None for plain decoding.
        cancelled: Asked before each engine call.
    """
    if cancelled():
        return
    sequence.cancelled = cancelled
    try:
        step = sequence.prefill(request.prompt_token_ids, chooser)
    except PrefillCancelled:
        return
    newest = step.token_ids[0]
    finished = tracker.push(newest, is_draft=False)
    if drafts is not None:
        drafts.settled(request.prompt_token_ids)
        drafts.settled((newest,))
    yield Round(token_ids=(newest,), num_draft_tokens=0, num_accepted_tokens=0, logprobs=step.logprobs)
    emitted = 1
    limit = min(request.settings.max_new_tokens, request.max_total_tokens - len(request.prompt_token_ids))
    while finished is None:
        # The bonus token always fits: a draft never reaches past the last token that may be emitted.
        k = min(request.num_speculative_tokens, limit - emitted - 1)
        if cancelled():
            return
        draft = drafts.propose(newest, k) if drafts is not None and k > 0 else []
        if len(draft) > k:
            raise EngineError(
                f"The engine's drafter gave {len(draft)} tokens where at most {k} were asked for.",
                "This is a defect of the backend; report it to its authors.",
            )
        if cancelled():
            return
        base = sequence.length
        step = sequence.verify([newest, *draft], chooser)
        if len(step.token_ids) != len(draft) + 1:
            raise EngineError(
                f"The engine chose {len(step.token_ids)} tokens for {len(draft) + 1} rows.",
                "This is a defect of the backend; report it to its authors.",
            )
        accepted = 0
        while accepted < len(draft) and draft[accepted] == step.token_ids[accepted]:
            accepted += 1
        kept = 0
        for index, token_id in enumerate(step.token_ids[: accepted + 1]):
            finished = tracker.push(token_id, is_draft=index < accepted)
            kept += 1
            if finished is not None:
                break
        accepted = min(accepted, kept)
        sequence.rollback(base + 1 + accepted)
        tokens = tuple(step.token_ids[:kept])
        newest = tokens[-1]
        emitted += kept
        if drafts is not None and finished is None:
            drafts.settled(tokens)
        yield Round(
            token_ids=tokens,
            num_draft_tokens=len(draft),
            num_accepted_tokens=accepted,
            logprobs=None if step.logprobs is None else step.logprobs[:kept],
        )
