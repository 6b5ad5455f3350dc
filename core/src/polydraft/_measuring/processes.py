"""A bench with a process for each engine: a crash is one row, and its memory is its own."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from polydraft._measuring.bench import AnyK, CallSettings, Group, LoadedInfo, NotMeasurable, Sample, Way
from polydraft._measuring.child import Answer, Job
from polydraft._presentable import presentable
from polydraft._probes.interpreter import command_of, environment_of
from polydraft._workers.backend import crossing_options
from polydraft.errors import InvalidRequestError
from polydraft.files import system_errors
from polydraft.hardware import free_memory
from polydraft.secrets import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from polydraft._measuring.prompts import MeasuredPrompt
    from polydraft.verification._verdict import Verdict

__all__ = ["BenchInProcesses"]

_GROUP, _WAYS = TypeAdapter(Group), TypeAdapter(tuple[Way, ...])
_GRACE = 60.0
"""Seconds for an answer beyond what was asked for: a call is ended between two rounds, and a round may take long."""
_LOOK = 180.0
"""Seconds for looking at a backend: it imports the engine."""
_LAST_WORDS = 300
"""Characters of the end of what a process wrote."""
_ROOM = 1.25
"""Another engine is loaded next to those that are there if so many times the largest of them fits."""


class BenchInProcesses:
    """Starts a process for each group.

    Engines stay loaded next to one another where memory allows, so that calls can alternate: on the processor, and as
    long as another one of the size of the largest so far would fit. Else the others are ended first.

    Args:
        target: As for ``load``.
        given: The arguments of ``load``, checked.
        named: Whether the caller named the backends.
        load_limit: Seconds that an engine may take to load.
        python: Backend -> the interpreter that has it.
        free_memory: Gives the free memory in bytes.

    Raises:
        InvalidRequestError: Engine options cannot be given to another process.
    """

    def __init__(
        self,
        target: str | Path,
        given: Mapping[str, Any],
        *,
        named: bool,
        load_limit: float,
        python: Callable[[str], Path],
        free_memory: Callable[[], int] = free_memory,
    ) -> None:
        self._target = str(target)
        self._arguments = {name: _plain(value) for name, value in given.items() if name != "host"}
        if (options := given.get("engine_options")) is not None:
            self._arguments["engine_options"] = crossing_options(options, "measure in this process, with a `host`")
        self._named = named
        self._load_limit = load_limit
        self._python = python
        self._free_memory = free_memory
        self._looking: dict[str, _Process] = {}
        """Backends that were looked at, whose process will load a group."""
        self._running: dict[Group, _Process] = {}
        self._infos: dict[Group, LoadedInfo] = {}

    def ways(self, backend: str) -> tuple[Way, ...]:
        """As ``Bench.ways``."""
        process = self._looking[backend] = _Process(self._python(backend))
        job = Job(what="ways", target=self._target, arguments=self._arguments, backend=backend, named=self._named)
        try:
            return _WAYS.validate_python(process.ask(job, _LOOK, f"{backend} did not tell what it can do"))
        except BaseException:
            self._looking.pop(backend).end()
            raise

    def load(self, group: Group) -> LoadedInfo:
        """As ``Bench.load``."""
        self._make_room()
        process = self._looking.pop(group.backend, None) or _Process(self._python(group.backend))
        job = Job(
            what="load", target=self._target, arguments=self._arguments, group=_GROUP.dump_python(group, mode="json")
        )
        try:
            told = process.ask(job, self._load_limit, "It was not loaded")
            info = LoadedInfo.model_validate(told)
        except BaseException:
            process.end()
            raise
        self._running[group] = process
        self._infos[group] = info
        return info

    def info(self, group: Group) -> LoadedInfo:
        """As ``Bench.info``."""
        if group in self._running:
            with contextlib.suppress(NotMeasurable):
                memory = self._running[group].ask(Job(what="memory"), _GRACE, "It did not tell its memory")
                self._infos[group] = self._infos[group].model_copy(update=memory)
        return self._infos[group]

    def measure(self, group: Group, k: AnyK, prompt: MeasuredPrompt, settings: CallSettings, limit: float) -> Sample:
        """As ``Bench.measure``."""
        job = Job(what="measure", k=k, prompt=prompt, settings=settings, seconds=limit)
        # Twice: the call before the first one that counts.
        return Sample.model_validate(self._ask(group, job, 2 * limit + _GRACE, "It did not answer a call"))

    def verdict(self, group: Group, k: int, seconds: float) -> Verdict | None:
        """As ``Bench.verdict``."""
        job = Job(what="verdict", k=k, seconds=seconds)
        found: Verdict | None = self._ask(group, job, seconds + 2 * _GRACE, "It was not verified")
        return found

    def together(self, groups: list[Group]) -> bool:
        """As ``Bench.together``."""
        return all(group in self._running for group in groups)

    def unload(self, group: Group) -> None:
        """As ``Bench.unload``."""
        if group in self._running:
            self.info(group)
            self._running.pop(group).end()

    def close(self) -> None:
        """As ``Bench.close``; at once, whatever they are doing."""
        for process in [*self._running.values(), *self._looking.values()]:
            process.end()
        self._running.clear()
        self._looking.clear()

    def _ask(self, group: Group, job: Job, seconds: float, what: str) -> Any:
        if group not in self._running:
            self.load(group)
        try:
            return self._running[group].ask(job, seconds, what)
        except NotMeasurable:
            if not self._running[group].alive:
                self._running.pop(group).end()
            raise

    def _make_room(self) -> None:
        """End what is loaded if another engine of the size of the largest may not fit."""
        for group in list(self._running):
            self.info(group)
        largest = max((self._infos[group].peak_memory_bytes or 0 for group in self._running), default=0)
        # On a device: engines may take all of its memory.
        on_device = any(not self._infos[group].device.startswith("cpu") for group in self._running)
        if on_device or (largest and self._free_memory() < _ROOM * largest):
            for group in list(self._running):
                self.unload(group)


class _Process:
    """One child. It cannot outlive this process: it ends with its standard input."""

    def __init__(self, python: Path) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``end``
        # Ctrl+C is this process's own.
        with system_errors("A process for an engine cannot be started"):
            self._child = subprocess.Popen(
                command_of(python, "polydraft._measuring.child"),
                env=environment_of(python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                start_new_session=True,
            )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="polydraft-measuring-answers", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._child.poll() is None

    def ask(self, job: Job, seconds: float, what: str) -> Any:
        """The answer's value.

        Raises:
            InvalidRequestError: The request was wrong.
            NotMeasurable: It failed, ended, or did not answer in time; then it is ended.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(job.model_dump_json().encode() + b"\n")
            self._child.stdin.flush()
            until = time.monotonic() + seconds
            line = self._answers.get(timeout=min(seconds, threading.TIMEOUT_MAX))  # on Windows 49 days
            while line and (told := _told(line)):
                logging.getLogger(told.log).info("%s", told.reason)
                line = self._answers.get(timeout=min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))
        except queue.Empty:
            self.end()
            raise NotMeasurable("slow", f"{what} within {seconds:.0f} s.") from None
        except OSError:  # a broken pipe
            line = b""
        if not line:
            raise NotMeasurable("failed", self._last_words())
        try:
            answer = Answer.model_validate_json(line)
        except ValidationError:
            self.end()
            raise NotMeasurable("failed", "Its process gave an answer that is not understood.") from None
        if answer.argument is not None:
            raise InvalidRequestError(answer.reason, answer.hint, argument=answer.argument)
        if answer.state:
            raise NotMeasurable(answer.state, answer.reason)  # type: ignore[arg-type]
        return answer.value

    def end(self) -> None:
        """Kill it, with the servers that it started."""
        if self.alive:
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(self._child.pid, signal.SIGKILL)
                else:
                    self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._log):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(b"")

    def _last_words(self) -> str:
        """How it ended, and the end of what it wrote."""
        code = self._child.wait()
        how = f"with exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"by {signal.Signals(-code).name}"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4 * _LAST_WORDS))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        said = f" Its last words: {presentable(lines[-1][-_LAST_WORDS:])}" if lines else ""
        return f"Its process ended {how}.{said}"


def _told(line: bytes) -> Answer | None:
    """What begins, if that is all that a line tells."""
    with contextlib.suppress(ValidationError):
        answer = Answer.model_validate_json(line)
        return answer if answer.log.startswith("polydraft.progress") else None
    return None


def _plain(value: Any) -> Any:
    """An argument as data: over a pipe to a process of this user, with its secrets."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Path):
        return str(value)
    return value
