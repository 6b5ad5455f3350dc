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

    LiteRT-LM says neither ids nor what was accepted. A piece of text is what one round emitted, so accepted drafts are
    counted from its tokens, if the output did not end with an end-of-sequence id: whether that was the last round's
    bonus token, one of its accepted drafts or a round of its own, nothing tells.

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

    def __iter__(self) -> Iterator[Round]:
        generation = self._generation
        request, settings = generation.request, generation.request.settings
        sampler = Sampler.of(settings, request.seed + request.stream, self._tokenizer.vocab_size)
        while generation.finish_reason is None and not generation.cancelled():
            text = [*request.prompt_token_ids, *generation.token_ids]
            left = min(settings.max_new_tokens - len(generation.token_ids), request.max_total_tokens - len(text))
            answer = self._runtime.answer(
                self._tokenizer.contents(text),
                sampler,
                # With drafts, LiteRT-LM counts rejected ones, too (LiteRT-LM#2816). Without, it waits with tokens that
                # may begin a sequence at which it ends: some more, so that the last ones come.
                None if self._drafts else left + self._tokenizer.held_tokens,
                speculate=bool(self._drafts),
            )
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
            if self._drafts and not begins:
                yield self._emit(token_ids, piece.received, drafted=True)
            else:  # the prefill's token, or plain decoding
                if self._drafts and (len(token_ids) > 1 or generation.token_ids):
                    self._accepted = None
                for index in range(len(token_ids)):
                    yield self._emit(token_ids[index : index + 1], piece.received, drafted=False)
                    if generation.finish_reason is not None:
                        return
            if generation.finish_reason is not None:
                return
            begins = False
        if not generation.cancelled():
            self._accepted = None
            yield self._emit([self._end()], time.perf_counter(), drafted=bool(self._drafts))

    def _emit(self, token_ids: list[int], received: float, *, drafted: bool) -> Round:
        generation = self._generation
        if self._begun == self._first:
            self._first = received
        unknown = None if drafted else 0
        emitted = generation.emit(
            token_ids, num_draft_tokens=unknown, num_accepted_tokens=unknown, seconds=received - self._latest
        )
        self._latest = received
        if drafted and self._accepted is not None:
            whole = len(token_ids) <= self._drafts + 1 and self._tokenizer.is_whole(token_ids)
            if whole:
                self._accepted.append(min(len(token_ids) - 1, len(emitted.token_ids)))
            else:
                self._accepted = None
        if generation.finish_reason is not None and self._drafts and self._accepted is not None:
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
