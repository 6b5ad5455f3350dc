"""The app's end of a worker: starts the process, sends, hands on what it sends, and notices its end.

Three threads belong to a worker: one starts it and reads from it, one writes to it, one reads its standard error. The
app's threads only put things into queues and take them out, so that Ctrl+C in the app never cuts a message in two, and
neither a full pipe nor a reader that is slow keeps one call waiting for another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polydraft._probes.interpreter import command_of, environment_of, is_own
from polydraft._workers.crashes import Death, oom_kills
from polydraft._workers.failures import error_of
from polydraft._workers.logs import replay_log, replay_warning
from polydraft._workers.messages import (
    Answer,
    Ended,
    FrameError,
    Frames,
    LogLine,
    Message,
    Question,
    RoundDone,
    Warned,
    frame,
    spelling,
)
from polydraft.errors import BackendUnavailableError, PolydraftError, SessionClosedError
from polydraft.files import system_error, system_errors

__all__ = ["Inbox", "WorkerProcess"]

_log = logging.getLogger("polydraft.workers")

_READ = 1 << 16
_TAIL = 1 << 14
"""Bytes of a worker's standard error that are kept."""
_START = 120.0
"""Seconds that a new worker has to answer: its Python and polydraft are imported, from a slow disk perhaps."""
_GRACE = 20.0
"""Seconds that a worker has to free its engine and to end."""


class Inbox(queue.SimpleQueue[Any]):
    """What a waiting thread reads: messages, and None once the worker has ended."""


class WorkerProcess:
    """A worker process, which ends with this object and with this process.

    It is a session and a process group of its own: a terminal's Ctrl+C does not reach it. It ends when this process
    does, however that ends: its standard input ends then, and on Linux the kernel kills it as well.

    Args:
        name: The backend's name, for errors.
        python: The interpreter.
        variables: Environment variables in addition to this process's.
        mend: The command that brings the worker's polydraft to this version, for errors.

    The constructor returns while the process still starts: ``await_ready`` waits for it.
    """

    def __init__(
        self, name: str, python: Path, *, variables: Mapping[str, str] | None = None, mend: str = "reinstall polydraft"
    ) -> None:
        self._inner = _Inner(name, python, dict(variables or {}), mend)
        # The threads hold the inner object only, so that this one can be collected.
        self._end = weakref.finalize(self, _Inner.kill, self._inner)
        self._ready = False

    def await_ready(self) -> None:
        """Wait until it has started, and compare its version with this one.

        Raises:
            BackendUnavailableError: It cannot be started, or its polydraft speaks another version of the protocol.
            SystemResourceError: The machine is short of something.
        """
        if self._ready:
            return
        try:
            self._inner.await_hello()
        except BaseException:
            self.kill()
            raise
        self._ready = True

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._inner.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._inner.death is None

    def send(self, message: Message) -> None:
        """Send a message; returns at once."""
        self._inner.send(message)

    def ask(self, name: str, arguments: Mapping[str, Any] | None = None, *, doing: str = "") -> Answer:
        """Ask a question, and wait for the answer.

        Args:
            name: Which one.
            arguments: JSON-ready.
            doing: For the error of a worker that dies: what it was asked for, as part of a sentence.

        Raises:
            PolydraftError: What the worker raised.
            EngineCrashedError: It has ended.
        """
        return self._inner.ask(name, dict(arguments or {}), doing)

    def begin(self, make: Callable[[int], Message], inbox: Inbox) -> int:
        """Open a call, whose rounds go to ``inbox``; its number is given to ``make``.

        Raises:
            EngineCrashedError: The worker has ended.
        """
        return self._inner.begin(make, inbox)

    def forget(self, call: int) -> None:
        """Drop what still comes for a call."""
        self._inner.forget(call)

    def check_alive(self, doing: str = "") -> None:
        """Raise if it has ended.

        Raises:
            EngineCrashedError: It has ended.
            SessionClosedError: It was closed.
        """
        self._inner.check_alive(doing)

    @property
    def spellings(self) -> dict[int, bytes]:
        """The bytes of tokens that it has sent; they come along with rounds and answers."""
        return self._inner.spellings

    def close(self) -> None:
        """Have the engine freed, and end the worker: by SIGKILL if that takes longer than 20 seconds."""
        self._inner.close()
        self._end()

    def kill(self) -> None:
        """End it at once."""
        self._end()


class _Inner:
    """What the threads of a worker share."""

    def __init__(self, name: str, python: Path, variables: dict[str, str], mend: str) -> None:
        self.name, self.mend = name, mend
        self.death: Death | None = None
        self.pid = 0
        self.spellings: dict[int, bytes] = {}
        self._python = python
        self._variables = variables
        self._home = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._hello = Inbox()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Reentrant: a signal handler may cancel or close while its thread is inside.
        self._lock = threading.RLock()
        self._answers: dict[int, Inbox] = {}
        self._calls: dict[int, Inbox] = {}
        self._number = 0
        self._closing = False
        self._tail = bytearray()
        self._broken = ""
        self._buried = threading.Event()
        # The thread that starts the process also outlives it: Linux kills a process when the *thread* that started it
        # ends, if it asks for a signal on its parent's death.
        with system_errors(f"The worker of {name} cannot be started"):
            threading.Thread(target=self._run, name=f"polydraft-worker-{name}", daemon=True).start()

    def await_hello(self) -> None:
        """Wait for the first message, and compare versions."""
        from importlib.metadata import version

        from polydraft._workers.messages import PROTOCOL_VERSION, records_digest

        try:
            hello = self._hello.get(timeout=_START)
        except queue.Empty:
            raise BackendUnavailableError(
                f"The worker of {self.name} ({self._python}) has not answered within {_START:g} seconds.",
                f"Look at what its Python does at its start: `{self._python} -P -c 'import polydraft'`.",
            ) from None
        if isinstance(hello, BaseException):
            raise hello
        if hello.protocol != PROTOCOL_VERSION:
            raise BackendUnavailableError(
                f"The worker of {self.name} runs polydraft {hello.polydraft}, which speaks version {hello.protocol} of "
                f"the worker protocol; this polydraft {version('polydraft')} speaks version {PROTOCOL_VERSION}.",
                self._mending,
            )
        if hello.records != records_digest():
            raise BackendUnavailableError(
                f"The worker of {self.name} runs polydraft {hello.polydraft}, whose records are not those of this "
                f"polydraft {version('polydraft')}.",
                self._mending,
            )

    @property
    def who(self) -> str:
        """For errors."""
        return f"The worker of {self.name} (process {self.pid})"

    @property
    def _mending(self) -> str:
        return f"Bring both to one version: `{self.mend}`."

    # Sending ----------------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        self._outbox.put(frame(message))

    def ask(self, name: str, arguments: dict[str, Any], doing: str, seconds: float | None = None) -> Answer:
        inbox = Inbox()
        with self._lock:
            self.check_alive("")
            self._number += 1
            number = self._number
            self._answers[number] = inbox
        try:
            self.send(Question(number=number, name=name, arguments=arguments))
            answer = inbox.get(timeout=seconds)
            while isinstance(answer, Warned):
                replay_warning(answer)
                answer = inbox.get(timeout=seconds)
        finally:
            self._answers.pop(number, None)
        if answer is None:
            raise self._gone(doing)
        if answer.error is not None:
            raise error_of(answer.error)
        return answer  # type: ignore[no-any-return]

    def begin(self, make: Callable[[int], Message], inbox: Inbox) -> int:
        with self._lock:
            self.check_alive("")
            self._number += 1
            number = self._number
            self._calls[number] = inbox
        try:
            self.send(make(number))
        except BaseException:
            self.forget(number)
            raise
        return number

    def forget(self, call: int) -> None:
        self._calls.pop(call, None)

    def check_alive(self, doing: str) -> None:
        if self.death is not None or self._closing:
            raise self._gone(doing)

    def _gone(self, doing: str) -> PolydraftError:
        if self._closing or self.death is None:
            return SessionClosedError("This engine is closed.", "Load a new session with polydraft.load.")
        return self.death.error(doing)

    # The threads ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        kills = oom_kills()
        process = None
        try:
            process = _start(self._python, self._variables)
            errors = threading.Thread(target=self._listen, args=(process,), name="polydraft-worker-errors", daemon=True)
            errors.start()
            threading.Thread(target=self._write, args=(process,), name="polydraft-worker-writer", daemon=True).start()
        except (OSError, MemoryError, RuntimeError) as error:
            if process is not None:
                _kill_group(process)
                process.wait()
            self._hello.put(
                system_error(error, f"The worker of {self.name} cannot be started")
                or BackendUnavailableError(
                    f"The worker of {self.name} cannot be started ({self._python}): "
                    f"{getattr(error, 'strerror', '') or error}.",
                    self._mending,
                )
            )
            return
        self._process, self.pid = process, process.pid
        _open.add(self)
        try:
            self._read(process)
        except FrameError as error:
            self._broken = f"wrote what is no message ({error})"
        except OSError:  # closed by ``kill``
            pass
        finally:
            self._bury(process, errors, kills)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        frames, descriptor = Frames("worker"), process.stdout.fileno()
        while data := os.read(descriptor, _READ):
            for message in frames.feed(data):
                self._dispatch(message)

    def _dispatch(self, message: Any) -> None:
        if isinstance(message, RoundDone | Answer):
            for token_id, text in message.spelled.items():
                self.spellings[token_id] = spelling(text)
        if isinstance(message, RoundDone):
            inbox = self._calls.get(message.call)
        elif isinstance(message, Ended):
            inbox = self._calls.pop(message.call, None)
        elif isinstance(message, Answer):
            inbox = self._answers.get(message.number)
        elif isinstance(message, Warned):
            inbox = self._calls.get(message.call) or next(iter(list(self._answers.values())), None)
        elif isinstance(message, LogLine):
            replay_log(message)
            return
        else:
            inbox = self._hello
        if inbox is not None:
            inbox.put(message)

    def _write(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        pipe = process.stdin
        with contextlib.suppress(OSError, ValueError):  # it has ended, which its reader tells
            while (data := self._outbox.get()) is not None:
                # What has gathered meanwhile goes along: one system call for many small messages.
                batch = [data]
                while not self._outbox.empty() and len(batch) < 64:
                    more = self._outbox.get()
                    if more is None:
                        self._outbox.put(None)
                        break
                    batch.append(more)
                left = memoryview(b"".join(batch))
                while left:
                    left = left[pipe.write(left) :]
        with contextlib.suppress(OSError):
            pipe.close()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Standard error: shown like the engine's in this process, and the end of it kept."""
        assert process.stderr is not None
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(process.stderr.fileno(), _READ):
                self._tail += data
                del self._tail[:-_TAIL]
                with contextlib.suppress(Exception):  # closed, or replaced by the app
                    sys.stderr.write(data.decode("utf-8", "replace"))
                    sys.stderr.flush()

    def _bury(self, process: subprocess.Popen[bytes], errors: threading.Thread, kills: int | None) -> None:
        """The pipe has ended: learn how the worker did, and tell all who wait."""
        self._outbox.put(None)
        # It has closed its end, and is to end by itself; what goes on without a pipe is of no use.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.0 if self._broken else _GRACE if self._closing else 2.0)
        if process.poll() is None and not self._closing:
            self._broken = self._broken or "closed its pipe"
        _kill_group(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        errors.join(1.0)  # a child of the worker's may hold the pipe open
        after = oom_kills()
        death = Death(
            self.who,
            process.returncode,
            self._tail.decode("utf-8", "replace"),
            None if kills is None or after is None else after - kills,
            self._broken,
        )
        with self._lock:
            self.death = death
            waiting = [*self._answers.values(), *self._calls.values()]
            self._answers, self._calls = {}, {}
        for pipe in (process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        _open.discard(self)
        if not self._closing:
            _log.info("%s has ended (%s)", self.who, death.signal or death.code)
        self._hello.put(self._unborn(death))
        for inbox in waiting:
            inbox.put(None)
        self._buried.set()

    def _unborn(self, death: Death) -> PolydraftError:
        """The error for a worker that ended before its first message."""
        if death.signal:
            return death.error("before it could be used")
        said = (death.broken or death.last_words or f"it ended with exit code {death.code}").rstrip(".")
        return BackendUnavailableError(
            f"{self._python} has no polydraft that can be a worker of {self.name}: {said}.", self._mending
        )

    # The end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ask for an orderly end, and wait for it."""
        if os.getpid() != self._home or self.death is not None or self._closing:
            return
        try:
            self.ask("close", {}, "while it was being closed", _GRACE)
        except queue.Empty:  # it hangs: ``kill`` follows
            return
        finally:
            self._closing = True
            self._outbox.put(None)  # standard input ends after what is queued
        self._buried.wait(_GRACE)

    def kill(self) -> None:
        """End it at once, with its children. Waits for nothing: garbage collection may call this anywhere."""
        # A forked child must not: the worker is its parent's. The number of one that has ended may be another's.
        if os.getpid() != self._home or self.death is not None:
            return
        self._closing = True
        self._outbox.put(None)
        if self._process is not None:
            _kill_group(self._process)


def _start(python: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = environment_of(python)
    if sys.stderr is not None and sys.stderr.isatty():
        # The pipe is shown on a terminal: without this, huggingface_hub would not draw the bars of its downloads.
        environment.setdefault("TQDM_POSITION", "-1")
    environment |= variables
    options: dict[str, Any] = {}
    if sys.platform == "win32":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        options["start_new_session"] = True
    module, parent = "polydraft._workers.child", str(os.getpid())
    # -P: a folder named like a module, where the app was started, must not be imported.
    command = command_of(python, module, parent) if is_own(python) else [str(python), "-P", "-m", module, parent]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=environment,
        **options,
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and its children. One that has ended may still have children."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


_open: weakref.WeakSet[_Inner] = weakref.WeakSet()
"""Workers of this process that run."""


def _close_pipes() -> None:
    """A forked child must not hold the pipes open after this process has ended."""
    for inner in list(_open):
        process = inner._process
        for pipe in (process.stdin, process.stdout, process.stderr) if process is not None else ():
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_pipes)
