"""The loop of rounds: draft, verify, accept, roll back, emit.

A draft token is accepted while it equals the target's choice at its position (``polydraft.sampling``), so the output
is that of plain decoding, which is the same loop without drafts. This is exact-match verification; for temperature 0 it
is Leviathan et al. 2023 (arXiv:2211.17192), section 2 with argmax; for seeded sampling the noise is shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from polydraft._loop.asked import AskedSequence
from polydraft._loop.ngram import NgramDrafter
from polydraft._loop.schedule import SessionSchedule
from polydraft.contract.stepping import PrefillCancelled
from polydraft.errors import OutOfMemoryError
from polydraft.sampling._rejection import make_sampler
from polydraft.sampling._soundness import UNSOUND
from polydraft.sampling.numpy_ops import array_ops_of
from polydraft.sampling.structured import Grammars

if TYPE_CHECKING:
    from polydraft._loop.kept import KeptSequences
    from polydraft._loop.schedule import CallPicks, Schedule
    from polydraft.contract.results import Round
    from polydraft.contract.stepping import SteppingEngine
    from polydraft.contract.whole import Generation
    from polydraft.sampling._sampler import RuleSampler

__all__ = ["run_rounds", "stepping_rounds"]


def stepping_rounds(
    engine: SteppingEngine,
    generation: Generation,
    kept: KeptSequences,
    schedule: Schedule | None = None,
    grammars: Grammars | None = None,
) -> Iterator[Round]:
    """Run the loop on a sequence of the engine with a new sampler. Errors are those of the engine's primitives.

    Args:
        engine: Runs it.
        generation: The call.
        kept: Opens the sequence, which may store the start of the prompt, and takes it when the call has ended.
        schedule: Picks k where the request does not fix it, and keeps what it learns for the next call.
        grammars: Those of the engine; None: made anew.
    """
    try:
        yield from _on_a_sequence(engine, generation, kept, schedule, grammars)
        return
    except OutOfMemoryError:
        # What is kept gives way to a prompt.
        if generation.token_ids or not kept.clear():
            raise
    # Here, where the error and the arrays in its frames are gone.
    yield from _on_a_sequence(engine, generation, kept, schedule, grammars)


def _on_a_sequence(
    engine: SteppingEngine,
    generation: Generation,
    kept: KeptSequences,
    schedule: Schedule | None,
    grammars: Grammars | None,
) -> Iterator[Round]:
    vocab_size, request = engine.tokenizer.vocab_size, generation.request
    grammar = (grammars or Grammars(engine.tokenizer)).run(request)
    sampler = make_sampler(array_ops_of(engine), request, engine.running.dtype, vocab_size, grammar)
    try:
        sequence, reused = kept.open(request)
        ended = False
        try:
            asked = AskedSequence(
                sequence, sampler, vocab_size, wants_logprobs=request.settings.logprobs is not None, stored=reused
            )
            picks: CallPicks | None = None
            if request.least_speculative_tokens is not None:
                schedule = SessionSchedule(request.num_speculative_tokens) if schedule is None else schedule
                # A drafter with a KV cache of its own has followed the tokens that are reused.
                picks = schedule.call(len(request.prompt_token_ids) - reused, request.least_speculative_tokens)
            drafts = request.num_speculative_tokens > 0
            ngram = NgramDrafter() if drafts and engine.running.method == "ngram" else None
            try:
                yield from run_rounds(asked, generation, sampler, ngram, picks)
            except GeneratorExit:  # closed between two rounds
                ended = asked.sound
                raise
            # A prefill that was cancelled has run some of the prompt.
            ended = asked.sound and bool(generation.token_ids)
        finally:
            if ended:
                stored = (*request.prompt_token_ids, *generation.token_ids)[: asked.stored]
                kept.keep(sequence, request, stored, len(request.prompt_token_ids))
            else:
                kept.discard(sequence)
    finally:
        sampler.close(generation.token_ids)


def run_rounds(
    asked: AskedSequence,
    generation: Generation,
    sampler: RuleSampler,
    ngram: NgramDrafter | None = None,
    picks: CallPicks | None = None,
) -> Iterator[Round]:
    """Generate until the output ends or the caller cancels.

    The first Round holds the token that prefill chose. After each Round the sequence stores the KV of emitted tokens
    only: of all but the newest, unless the newest was an accepted draft that ended the output.

    Args:
        asked: A sequence of the engine, empty or with the start of the prompt, and what chooses its tokens.
        generation: Has the prompt, limits and k (0: plain decoding), gets each round's tokens, and decides when the
            output ends.
        sampler: What chooses them, which knows what a grammar leaves open.
        ngram: Drafts instead of the sequence, if given.
        picks: Picks k for each round, if given, in place of the request.

    Raises:
        EngineError: The engine broke the contract: it drafted too many tokens or what is no token, chose more or fewer
            than one token per row, or for other ids or positions than it was given, or stores another number of tokens
            than were run and not rolled back.
        NonFiniteLogitsError: No token can be chosen from logits of the target, or of the drafter.
    """
    request = generation.request
    guided = request.settings.guided is not None
    if generation.cancelled():
        return
    # Before the prefill, which asks between the chunks of a long prompt.
    asked.sequence.cancelled = generation.cancelled
    generation.report_reused(asked.stored)
    try:
        step = asked.prefill(request.prompt_token_ids)
    except PrefillCancelled:
        return
    emitted = generation.emit(
        step.token_ids, num_draft_tokens=0, num_accepted_tokens=0, draft_token_ids=(), logprobs=step.logprobs
    )
    # Chosen, but not yet run: the next ``verify`` stores its KV.
    newest = emitted.token_ids[0]
    if ngram is not None:
        ngram.extend((*request.prompt_token_ids, newest))
    yield emitted
    stored = len(request.prompt_token_ids)  # tokens whose KV the sequence must store
    limit = min(request.settings.max_new_tokens, request.max_total_tokens - len(request.prompt_token_ids))
    left = limit - 1  # tokens that may still be emitted
    verified = perf_counter()
    picked, again = request.num_speculative_tokens, 0  # k, and how many rounds repeat it
    while generation.finish_reason is None and not generation.cancelled():
        began, before = perf_counter(), verified
        if again:
            again -= 1
        elif picks is not None:
            picked, again = picks.pick(left)
        # The bonus token always fits: a draft never reaches past the last token that may be emitted.
        k = min(picked, left - 1)
        # What a grammar leaves no choice about needs no drafter, where it is as much as the drafter would be asked for.
        most = min(request.num_speculative_tokens, left - 1)
        draft = sampler.forced_drafts(stored, newest, most) if guided and most > 0 else []
        forced, one_launch = len(draft) >= max(k, 1), False
        if not forced:
            draft = []
            if k > 0:
                draft = ngram.propose(k) if ngram is not None else asked.propose(newest, k)
                one_launch = ngram is None and asked.verified
                if ngram is not None:
                    draft = sampler.allowed_drafts(stored, newest, draft)
                if generation.cancelled():
                    return
        drafted = began if one_launch else perf_counter()
        step = asked.verify([newest, *draft])
        # The chosen ids are on the host: an asynchronous device has finished, too.
        verified = perf_counter()
        chosen = step.token_ids
        accepted = 0
        while accepted < len(draft) and draft[accepted] == chosen[accepted]:
            accepted += 1
        if chosen[accepted] == UNSOUND:
            # Attention carries a draft's NaN to other rows, masked or not. So the newest token runs alone, as in plain
            # decoding, which raises if its own row is not finite. Before that, copies of it write over the drafts' KV.
            asked.rollback(stored)
            asked.verify([newest] * (len(draft) + 1))
            asked.rollback(stored)
            step, accepted = asked.verify([newest]), 0
            chosen = step.token_ids
        elif picks is not None and not again and not forced:
            picks.count(len(draft), accepted, drafted - began, verified - drafted, began - before)
        # The choice at the first wrong draft, or after the last draft, is the bonus token: accepted + 1 tokens in all.
        emitted = generation.emit(
            chosen[: accepted + 1],
            num_draft_tokens=len(draft),
            num_accepted_tokens=accepted,
            draft_token_ids=draft,
            logprobs=step.logprobs,
        )
        # Accepted drafts after the end of the output were not emitted: remove them from the KV cache, too.
        stored += 1 + min(accepted, len(emitted.token_ids))
        asked.rollback(stored)
        newest = emitted.token_ids[-1]
        left -= len(emitted.token_ids)
        if ngram is not None:
            ngram.extend(emitted.token_ids)
        yield emitted
