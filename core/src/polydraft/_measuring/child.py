"""The process of one engine that is measured: ``python -m polydraft._measuring.child``.

Requests are lines of JSON on standard input, answers lines of JSON on what standard output was: nothing else is written
there. It ends when standard input does, in the middle of a call, too: with the process that started it.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import warnings
from typing import Any, TextIO

from pydantic import Field, TypeAdapter

from polydraft._load_arguments import checked_arguments
from polydraft._measuring.bench import AnyK, CallSettings, Group, NotMeasurable, Way, failure_of
from polydraft._measuring.loaded import LoadedEngine, ways_of
from polydraft._measuring.prompts import MeasuredPrompt
from polydraft._plugins import default_host
from polydraft.contract.records import Record
from polydraft.errors import PolydraftError

__all__ = ["Answer", "Job", "answer_to", "main"]

_GROUP = TypeAdapter(Group)


class Job(Record):
    """One request: ``what`` names a method of the bench, whose arguments the fields are."""

    what: str
    target: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)
    backend: str = ""
    named: bool = False
    group: dict[str, Any] | None = None
    k: AnyK = 0
    prompt: MeasuredPrompt | None = None
    settings: CallSettings | None = None
    seconds: float = 0.0


class Answer(Record):
    """What came of it: a value, or why not."""

    value: Any = None
    state: str = ""
    reason: str = ""
    argument: str | None = None
    """Of an ``InvalidRequestError``: the request was wrong, whatever the backend."""
    hint: str = ""
    log: str = ""
    """Not empty: no answer yet, but what begins, for this log; ``reason`` says what."""


class _Worker:
    """Holds the engine."""

    def __init__(self) -> None:
        self.engine: LoadedEngine | None = None

    def answer(self, job: Job) -> Any:
        if job.what in {"ways", "load"}:
            given = checked_arguments(job.target, job.arguments)  # type: ignore[arg-type]
            if job.what == "ways":
                found: tuple[Way, ...] = ways_of(job.target, given, job.backend, named=job.named)
                return [way.model_dump(mode="json") for way in found]
            self.engine = LoadedEngine(job.target, given, _GROUP.validate_python(job.group), default_host())
            return self.engine.info().model_dump(mode="json")
        assert self.engine is not None
        if job.what == "memory":
            return self.engine.memory()
        if job.what == "verdict":
            assert isinstance(job.k, int)
            return self.engine.verdict(job.k, job.seconds)
        assert job.prompt is not None
        assert job.settings is not None
        return self.engine.measure(job.k, job.prompt, job.settings, job.seconds).model_dump(mode="json")


def answer_to(worker: _Worker, job: Job) -> Answer:
    """The answer to one request; errors are answers, too."""
    from polydraft.errors import InvalidRequestError

    try:
        return Answer(value=worker.answer(job))
    except NotMeasurable as error:
        return Answer(state=error.state, reason=error.reason)
    except InvalidRequestError as error:
        return Answer(state="refused", reason=error.message, hint=error.hint, argument=error.argument)
    except PolydraftError as error:
        return Answer(state="failed", reason=str(error))
    except Exception as error:
        return Answer(state="failed", reason=failure_of(error))


class _Telling(logging.Handler):
    """Passes on what ``polydraft.progress`` tells while an engine is looked at or loaded, the memory that it needs."""

    def __init__(self, out: TextIO) -> None:
        super().__init__(logging.INFO)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        answer = Answer(reason=record.getMessage(), log=record.name)
        self._out.write(answer.model_dump_json() + "\n")
        self._out.flush()


def main() -> None:
    """Answer requests until there are no more."""
    # Engines print to standard output, and C libraries write straight to its descriptor.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # low acceptance is what is measured
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, jobs), name="polydraft-measuring-jobs", daemon=True).start()
    worker, told, telling = _Worker(), logging.getLogger("polydraft.progress"), _Telling(out)
    told.setLevel(logging.INFO)
    while True:
        job = Job.model_validate_json(jobs.get())
        if job.what in {"ways", "load"}:  # and nothing while calls are timed
            told.addHandler(telling)
        answer = answer_to(worker, job)
        told.removeHandler(telling)
        out.write(answer.model_dump_json() + "\n")
        out.flush()


def _read(stream: TextIO, jobs: queue.SimpleQueue[str]) -> None:
    for line in stream:
        jobs.put(line)
    # Not ``sys.exit``: whatever the engine is doing, nobody waits for it any more.
    os._exit(0)


if __name__ == "__main__":
    main()
