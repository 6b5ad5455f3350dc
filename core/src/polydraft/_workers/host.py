"""The worker's side: reads messages, answers questions, loads the engine, and runs calls on it."""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from polydraft._workers.failures import failure_of
from polydraft._workers.messages import (
    PROTOCOL_VERSION,
    Answer,
    Cancel,
    Credit,
    FrameError,
    Frames,
    Generate,
    Hello,
    Message,
    Open,
    Question,
    frame,
    records_digest,
)

if TYPE_CHECKING:
    from polydraft._workers.calls import ServedCall
    from polydraft._workers.served import ServedEngine

__all__ = ["EngineHost"]

_READ = 1 << 16
_DOING = {
    **dict.fromkeys(("encode", "chat"), "in encoding the prompt"),
    **dict.fromkeys(("spell", "token_id"), "in describing its tokens"),
    "measure_tie": "in scoring an output again",
    **{name: f"in its {name}()" for name in ("check_settings", "speculation_conflict", "close", "diagnose", "refuse")},
}
"""What an engine that fails was doing, as part of a sentence, in the words that the session uses."""
_THREADS = 4096
"""Of questions and of a concurrent engine's calls; they are made as they are needed."""


class EngineHost:
    """Serves one app over two pipes.

    Args:
        reading: Descriptor of the pipe from the app.
        writing: Descriptor of the pipe to it.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._write_lock = threading.Lock()
        self._main: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="polydraft-worker")
        self._calls: dict[int, ServedCall] = {}
        self._current = threading.local()
        self._served: ServedEngine
        self._engine: ServedEngine | None = None
        """Once it is loaded, until it is closed."""
        self._busy = 0
        """Loads and closes under way."""

    def serve(self) -> None:
        """Work until the app goes, or says that it is done."""
        from importlib.metadata import version

        if sys.platform != "win32":
            # A process that the engine forks would keep the pipe open after this one's end.
            os.register_at_fork(after_in_child=self._let_go)
        python = f"{sys.implementation.name} {sys.version.split()[0]}"
        mine = version("polydraft")
        self.send(Hello(protocol=PROTOCOL_VERSION, polydraft=mine, records=records_digest(), python=python))
        threading.Thread(target=self._read, name="polydraft-worker-reader", daemon=True).start()
        while (work := self._main.get()) is not None:
            work()
        # In order: engines have work to do when the interpreter ends. The app ends what hangs.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _let_go(self) -> None:
        for descriptor in (self._reading, self._writing):
            with suppress(OSError):
                os.close(descriptor)

    def send(self, message: Message) -> None:
        """Write a message; waits while the pipe is full."""
        self._write(frame(message))

    def _write(self, data: bytes) -> None:
        self._outbox.put(data)
        with self._write_lock:
            # All that other threads have added meanwhile, in one system call: a step of many calls has many rounds.
            batch = []
            with suppress(queue.Empty):
                while True:
                    batch.append(self._outbox.get_nowait())
            left = memoryview(b"".join(batch))
            while left:
                try:
                    left = left[os.write(self._writing, left) :]
                except OSError:  # the app has gone, or does not listen any more
                    _die()

    # Reading ----------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        frames = Frames("app")
        try:
            while data := os.read(self._reading, _READ):
                for message in frames.feed(data):
                    self._dispatch(message)
        except (FrameError, OSError) as error:
            print(f"polydraft's worker cannot read from its app: {error}", file=sys.stderr)
            _die()
        if self._engine is not None or self._busy:
            _die()  # the app has gone, and what runs is of no use
        self._main.put(None)

    def _dispatch(self, message: Any) -> None:
        if isinstance(message, Credit):
            if (call := self._calls.get(message.call)) is not None:
                call.add_room(message.rounds)
        elif isinstance(message, Cancel):
            if (call := self._calls.get(message.call)) is not None:
                call.cancel()
        elif isinstance(message, Generate):
            self._begin(message)
        elif isinstance(message, Open):
            self._open(message)
        elif isinstance(message, Question):
            # Loading and closing in the main thread, as in a program of its own: engines may need it.
            if message.name in {"load", "close"}:
                self._busy += 1
                self._main.put(lambda: self._answer(message))
            elif message.name == "measure_tie":  # it runs the engine, as a call does
                self._main.put(lambda: self._answer(message))
            else:
                self._threads.submit(self._answer, message)

    def _open(self, message: Open) -> None:
        from polydraft._workers.logs import follow_levels, forward_logs, forward_warnings
        from polydraft._workers.served import ServedEngine

        follow_levels(message.levels)
        logging.getLogger("polydraft.load").disabled = True  # the app says itself what it has loaded
        forward_logs(self.send)
        forward_warnings(self.send, lambda: getattr(self._current, "call", 0))
        self._served = ServedEngine(message.name, message.factory)

    def _answer(self, question: Question) -> None:
        try:
            value, spelled = self._served.answer(question.name, question.arguments)
            if question.name == "load":
                self._engine = self._served
                # Else Python looks through all objects of the engine while a text is generated: 0.2 s without a token.
                gc.collect()
                gc.freeze()
            data = frame(Answer(number=question.number, value=value, spelled=spelled))
        except BaseException as error:
            typed = self._served.typed(error, _DOING.get(question.name, f"in answering {question.name}"))
            data = frame(Answer(number=question.number, error=failure_of(typed)))
        if question.name == "close":
            self._engine = None
        if question.name in {"load", "close"}:
            self._busy -= 1
        self._write(data)

    # Calls ------------------------------------------------------------------------------------------------------------

    def _begin(self, message: Generate) -> None:
        from polydraft._workers.calls import ServedCall
        from polydraft._workers.logs import follow_levels

        if message.levels is not None:
            follow_levels(message.levels)
        engine = self._engine
        assert engine is not None, "the app generates after it has loaded"
        call = self._calls[message.call] = ServedCall(message, engine)

        def run() -> None:
            self._current.call = message.call
            try:
                call.run(self.send)
            finally:
                self._calls.pop(message.call, None)
                self._current.call = 0

        if engine.concurrent:
            self._threads.submit(run)
        else:
            self._main.put(run)


def _die() -> NoReturn:
    """End at once, with all children."""
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
