"""One call in the worker: the engine's rounds, checked as in the app's process, and sent one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from polydraft._session.call import Call
from polydraft._workers.failures import failure_of
from polydraft._workers.messages import Ended, Generate, Message, RoundDone
from polydraft.text._tracker import OutputTracker

if TYPE_CHECKING:
    from polydraft._workers.served import ServedEngine
    from polydraft.contract.results import EndReason, Round

__all__ = ["ServedCall"]


class ServedCall(Call):
    """The ``Generation`` that the engine sees. It ends where the app's own one will end.

    Args:
        message: The request.
        engine: The engine that runs it.
    """

    def __init__(self, message: Generate, engine: ServedEngine) -> None:
        tracker = OutputTracker(engine.tokenizer, message.request, parse_chat=False)
        super().__init__(message.request, tracker, engine.running, message.off)
        self._number = message.call
        self._engine = engine
        self._room = threading.Semaphore(message.room)
        self._finished: EndReason | None = None

    def finish(self, reason: EndReason) -> None:
        """The app's own call has to end for the same reason."""
        super().finish(reason)
        self._finished = reason

    def add_room(self, rounds: int) -> None:
        """The app has taken so many rounds."""
        self._room.release(rounds)

    def cancel(self) -> None:
        """The app has cancelled."""
        super().cancel()
        self._room.release()

    def run(self, send: Callable[[Message], None]) -> None:
        """Generate to the end."""
        failure = None
        rounds = None
        try:
            started = time.perf_counter()
            rounds = self._engine.rounds(self)
            while self.finish_reason is None:
                # An engine does not run ahead of a slow reader by more than this.
                self._room.acquire()
                waited = time.perf_counter()
                emitted = next(rounds, None)
                self.check_yielded(emitted)
                if emitted is None:
                    break
                now = time.perf_counter()
                # Of the first round, the request included; of others, without the time that the reader took.
                send(self._message(emitted, now - (waited if self._rounds else started)))
                self.count(emitted, 0.0)
        except BaseException as error:
            failure = self._engine.typed(error)
        try:
            close = getattr(rounds, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            failure = failure or self._engine.typed(error, "in ending a generation")
        ended = Ended(call=self._number, error=None if failure is None else failure_of(failure))
        if self._finished is not None:
            ended = ended.model_copy(update={"finish": self._finished, "stats": self._reported})
        send(ended)

    def _message(self, emitted: Round, seconds: float) -> RoundDone:
        return RoundDone(
            call=self._number,
            token_ids=emitted.token_ids,
            certain=emitted.certain_ids,
            all_certain=self.certain_ids,
            drafted=emitted.num_draft_tokens,
            accepted=emitted.num_accepted_tokens,
            drafts=emitted.draft_token_ids,
            reused=self.num_reused_tokens,
            seconds=seconds if emitted.seconds is None else emitted.seconds,
            logprobs=None
            if emitted.logprobs is None
            else tuple((entry.token_id, entry.logprob, entry.top) for entry in emitted.logprobs),
            stats=self._reported,
            last=self.finish_reason is not None,
            spelled=self._engine.new_spellings(_shown(emitted)),
        )


def _shown(emitted: Round) -> Iterator[int]:
    """The tokens of a round that the app may show: its output, rejected drafts, and candidates."""
    yield from emitted.token_ids
    yield from emitted.draft_token_ids or ()
    for entry in emitted.logprobs or ():
        yield from (token_id for token_id, _ in entry.top)
