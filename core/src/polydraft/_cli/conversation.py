"""A conversation with a session: its history, and answers that Ctrl-C cancels."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polydraft._session.session import Session
    from polydraft.contract import Chunk, GenerationResult

__all__ = ["Conversation", "interrupt_flag"]


class Conversation:
    """The messages so far, without thinking: chat templates expect earlier turns without it.

    ``settings`` are arguments of ``Session.stream`` for every answer; they may be changed between answers.
    """

    def __init__(self, session: Session, settings: dict[str, Any], system: str | None = None) -> None:
        self.session = session
        self.settings = settings
        self._system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Remove all messages but the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def say(self, text: str, show: Callable[[Chunk], None]) -> GenerationResult | None:
        """Answer a message, showing each chunk as it is generated.

        The message and its answer stay in the history, tool calls too, even if the answer has no text (all thought) or
        was cancelled. A message whose answer raised, or was cancelled before its first chunk, does not.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        begun = False
        with interrupt_flag() as interrupted:
            stream = self.session.stream(messages, **self.settings)
            try:
                for chunk in stream:
                    begun = True
                    show(chunk)
                    if interrupted.is_set():
                        break
            except KeyboardInterrupt:  # the second Ctrl-C: do not wait for the round to end
                interrupted.set()
            finally:
                stream.close()
        if begun and stream.result is not None:
            self.messages = [*messages, stream.result.message]
        return stream.result


@contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """Let the first Ctrl-C set a flag, and only the second one raise.

    The answer then ends between two rounds, not in the middle of an engine's step. Outside the main thread Python
    delivers no signals, and the flag stays unset.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_interrupt(number: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
