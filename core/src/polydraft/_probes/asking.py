"""Ask an interpreter about its backends, each in a process of its own, as many at a time as there are cores."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from polydraft._probes.processes import Child
from polydraft._probes.records import Answer, CataloguedBackend
from polydraft.contract.records import BackendRecord
from polydraft.files import exhausted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["Question", "ask", "ask_all", "find_deadly_plugins"]

_TICK = 0.05

Question = tuple["Path", str | BackendRecord]
"""An interpreter, and the backend of it that is asked for its state. With its record no plugin's hooks are asked there,
and known faults are not looked for: the caller has done both."""


def ask(
    python: Path, backends: Sequence[str] | None, *, seconds: float, want: Literal["state", "catalogue"]
) -> list[Answer]:
    """Ask one interpreter. Never raises for what happens in there: the answer has a ``problem`` then.

    Args:
        python: This program's own interpreter, or that of an environment that holds polydraft.
        backends: The ones to ask; None: all that its plugins provide.
        seconds: How long each may take.
        want: ``state``: one answer for each backend. ``catalogue``: a single answer, with everything that the plugins
            offer there, and each of the backends asked.

    Raises:
        SystemResourceError: File handles have run out.
        OutOfMemoryError: Memory has run out.
    """
    if want == "state" and backends is not None:
        return ask_all([(python, name) for name in backends], seconds=seconds)
    (found,) = _run([(python, {"want": "catalogue"})], seconds)
    if found.catalogue is None:
        return [found]
    wanted = [one for one in found.catalogue.backends if backends is None or one.record.name in backends]
    answers = ask_all([(python, one.record.name) for one in wanted], seconds=seconds)
    if want == "state":
        return answers
    asked = tuple(map(_with_answer, wanted, answers))
    return [found.model_copy(update={"catalogue": found.catalogue.model_copy(update={"backends": asked})})]


def _with_answer(one: CataloguedBackend, answer: Answer) -> CataloguedBackend:
    return one.model_copy(
        update={
            "state": answer.state_of(one.record),
            "capabilities": answer.capabilities,
            "options_schema": answer.options_schema,
        }
    )


def ask_all(questions: Sequence[Question], *, seconds: float) -> list[Answer]:
    """Ask backends of several interpreters; answers come in the order of the questions, which are asked in that order.

    Raises:
        SystemResourceError: File handles have run out.
        OutOfMemoryError: Memory has run out.
    """
    return _run([(python, _request(backend)) for python, backend in questions], seconds)


def find_deadly_plugins(python: Path, names: Callable[[], Iterable[str]], *, seconds: float) -> dict[str, str]:
    """Plugins whose own module, or hooks, end the process that imports them, or hang; each with the reason.

    Args:
        python: This program's own interpreter.
        names: Gives the names of all plugins; called only if there is one of those.
        seconds: How long the hooks may take.
    """
    (answer,) = _run([(python, {"want": "catalogue"})], seconds)
    if not answer.problem:
        return {}
    found = sorted(set(names()))
    # Each alone, and none at all: if that fails, too, it is not for a plugin.
    disabled = [found, *([one for one in found if one != name] for name in found)]
    control, *alone = _run([(python, {"want": "catalogue", "disabled": names}) for names in disabled], seconds)
    answers = {} if control.problem else dict(zip(found, alone, strict=True))
    return {name: f"Its import {answer.problem}" for name, answer in answers.items() if answer.problem}


def _request(backend: str | BackendRecord) -> dict[str, Any]:
    if isinstance(backend, str):
        return {"want": "state", "backend": backend}
    return {"want": "state", "backend": backend.name, "record": backend.model_dump(mode="json")}


def _run(requests: Sequence[tuple[Path, dict[str, Any]]], seconds: float) -> list[Answer]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting, running = deque(enumerate(requests)), dict[int, Child]()
    answers: dict[int, Answer] = {}
    try:
        while waiting or running:
            # One that hangs or waits for something leaves its core to the next.
            while waiting and sum(not child.waits for child in running.values()) < cores:
                number, (python, request) = waiting.popleft()
                try:
                    running[number] = Child(python, request, seconds)
                except OSError as error:
                    if refused := exhausted(error, f"{python} cannot be started"):
                        raise refused from error
                    problem = f"could not be started: {python}: {error.strerror or error}."
                    answers[number] = Answer(backend=request.get("backend", ""), problem=problem)
            if running:
                next(iter(running.values())).wait(_TICK)
            for number in [number for number, child in running.items() if child.ended()]:
                running[number].end()
                answers[number] = _read(running.pop(number), requests[number][1].get("backend", ""))
    finally:
        for child in running.values():
            child.end()
    return [answers[number] for number in range(len(requests))]


def _read(child: Child, backend: str) -> Answer:
    text, problem = child.result()
    answer = Answer(backend=backend, problem=problem)
    if text is not None:
        try:
            answer = Answer.model_validate_json(text)
        except ValidationError as error:
            answer = Answer(backend=backend, problem=f"gave an answer of another version of polydraft ({error.title}).")
    return answer.model_copy(update={"backend": backend, "seconds": time.monotonic() - child.started})
