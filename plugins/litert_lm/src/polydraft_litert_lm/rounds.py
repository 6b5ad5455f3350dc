"""One generation: the text that LiteRT-LM sends, as rounds of token ids."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from polydraft.contract import Generation, GenerationStats, Round
from polydraft.errors import EngineError

from polydraft_litert_lm.runtime import Answer, Sampler

if TYPE_CHECKING:
    from polydraft_litert_lm.runtime import Runtime
    from polydraft_litert_lm.tokenizer import LitertTokenizer

__all__ = ["Rounds"]

_HALF = math.log(0.5)


class Rounds:
    """The rounds of one generation. Where the engine ends at an id that does not end the output here, it goes on.

    LiteRT-LM says neither ids nor what was accepted. Plainly a piece of text is one token. With drafts it is what one
    round emitted, and might be spelled in several ways: two newlines are one token or two. At the end of an answer
    LiteRT-LM says how many tokens it had: if the pieces have as many, their ids are certain, and accepted drafts are
    counted from them. Not if an end-of-sequence id ended the output: whether that was the last round's bonus token, one
    of its accepted drafts or a round of its own, nothing tells.

    Args:
        runtime: The engine.
        tokenizer: The target's.
        generation: The call.
        drafts: Tokens drafted in each round; 0: plain decoding.
    """

    def __init__(self, runtime: Runtime, tokenizer: LitertTokenizer, generation: Generation, *, drafts: int) -> None:
        self._runtime, self._tokenizer, self._generation, self._drafts = runtime, tokenizer, generation, drafts
        self._begun = self._latest = time.perf_counter()
        self._first = self._begun
        self._accepted: list[int] | None = []
        """Accepted drafts of each round; None: not known."""
        self._written = self._most = 0
        """Tokens of this answer, and how many it may have."""
        self._certain = True
        """Whether the ids of all answers that have ended are certain."""
        self._settled = False
        """Whether that is so of all ids."""

    def __iter__(self) -> Iterator[Round]:
        generation = self._generation
        request, settings = generation.request, generation.request.settings
        sampler = Sampler.of(settings, request.seed + request.stream, self._tokenizer.vocab_size)
        while generation.finish_reason is None and not generation.cancelled():
            text = [*request.prompt_token_ids, *generation.token_ids]
            left = min(settings.max_new_tokens - len(generation.token_ids), request.max_total_tokens - len(text))
            # It waits with tokens that may begin a sequence at which it ends: some more, so that the last ones come.
            limit = left + self._tokenizer.held_tokens
            # The last round is not cut.
            self._written, self._most = 0, limit + self._drafts
            answer = self._runtime.answer(self._tokenizer.contents(text), sampler, limit, speculate=bool(self._drafts))
            with closing(answer):
                generation.on_cancel(answer.wake)
                yield from self._rounds_of(answer)

    def _rounds_of(self, answer: Answer) -> Iterator[Round]:
        generation = self._generation
        begins = True
        for piece in answer.pieces():
            if generation.cancelled():
                return
            if piece is None:
                continue
            token_ids = self._tokenizer.spelled(piece.text)
            self._written += len(token_ids)
            if self._drafts and not begins:
                yield self._emit(token_ids, piece.received, answer, drafted=True)
            else:  # the prefill's token, or plain decoding
                if self._drafts and (len(token_ids) > 1 or generation.token_ids):
                    self._accepted = None
                for index in range(len(token_ids)):
                    yield self._emit(token_ids[index : index + 1], piece.received, answer, drafted=False)
                    if generation.finish_reason is not None:
                        return
            if generation.finish_reason is not None:
                return
            begins = False
        if not generation.cancelled():
            self._accepted = None
            self._settle(answer)
            yield self._emit([self._end()], time.perf_counter(), None, drafted=bool(self._drafts))

    def _settle(self, answer: Answer) -> None:
        """The answer has ended: whether its ids are certain."""
        self._certain = self._certain and answer.num_tokens == self._written
        self._settled = self._certain
        if self._certain:
            self._generation.confirm_ids()

    def _read_on(self, answer: Answer) -> None:
        """A limit has cut the last round: what else it had."""
        for piece in answer.pieces():
            if piece is not None:
                self._written += len(self._tokenizer.spelled(piece.text))
            if self._written > self._most or self._generation.cancelled():
                return

    def _emit(self, token_ids: list[int], received: float, answer: Answer | None, *, drafted: bool) -> Round:
        """Emit a round of an answer; of none: the id at which it ended."""
        generation = self._generation
        if self._begun == self._first:
            self._first = received
        unknown = None if drafted else 0
        emitted = generation.emit(
            token_ids,
            num_draft_tokens=unknown,
            num_accepted_tokens=unknown,
            seconds=received - self._latest,
            certain_ids=not self._drafts or answer is None,
        )
        if self._drafts and answer is not None and generation.finish_reason in {"length", "context"}:
            self._read_on(answer)
            self._settle(answer)
        self._latest = received
        if drafted and self._accepted is not None:
            whole = len(token_ids) <= self._drafts + 1 and self._tokenizer.is_whole(token_ids)
            if whole:
                self._accepted.append(min(len(token_ids) - 1, len(emitted.token_ids)))
            else:
                self._accepted = None
        if generation.finish_reason is not None and self._settled and self._accepted is not None:
            generation.report(self._stats(self._accepted))
        return emitted

    def _stats(self, accepted: list[int]) -> GenerationStats:
        k, rounds = self._drafts, len(accepted)
        return GenerationStats(
            num_tokens=len(self._generation.token_ids),
            num_target_steps=rounds,
            num_drafts=rounds,
            num_draft_tokens=k * rounds,
            num_accepted_tokens=sum(accepted),
            accepted_per_position=tuple(sum(count > index for count in accepted) for index in range(k)),
            drafted_per_position=(rounds,) * k,
            prefill_seconds=self._first - self._begun,
            decode_seconds=self._latest - self._first,
        )

    def _end(self) -> int:
        """The id at which the engine ended. Where it may be one of several, the model says which is likely."""
        generation, tokenizer = self._generation, self._tokenizer
        ends = tokenizer.ends
        if not ends:
            raise EngineError("LiteRT-LM ended before the end of the output.", "Use a file that names its ends.")
        if len(ends) == 1:
            return ends[0]
        contents = tokenizer.contents([*generation.request.prompt_token_ids, *generation.token_ids])
        scores: dict[int, float] = {}
        for end in ends:
            scores[end] = self._runtime.score(contents, tokenizer.name(end))
            if scores[end] > _HALF:  # no other can be as likely
                break
        return max(scores, key=lambda end: scores[end])
