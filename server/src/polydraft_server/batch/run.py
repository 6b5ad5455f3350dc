"""A whole batch: what is left of it is done, here or on the workers of a Ray cluster, and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from polydraft import Session
from polydraft.errors import EngineError
from pydantic import BaseModel, ConfigDict, Field

from polydraft_server.batch.answering import Answering
from polydraft_server.batch.answers_file import AnswersFile
from polydraft_server.batch.ray_data import RayWorkers, answers_of_workers
from polydraft_server.batch.requests_file import RequestLine, RequestsFile
from polydraft_server.settings import ServerSettings

__all__ = ["BatchSummary", "run_batch"]

_TOLD_EVERY = 10.0
"""Seconds between lines that tell how far it is."""


class BatchSummary(BaseModel):
    """What a batch has come to. The counts are of lines; an earlier run's answers are among them."""

    model_config = ConfigDict(frozen=True)

    total: int
    completed: int = Field(description="Answered with status 200.")
    failed: int = Field(description="Refused or failed; the file of answers says why.")
    done_before: int = Field(description="Of an earlier run, and not done again.")
    seconds: float = Field(description="Of this run, without the load.")
    completion_tokens: int = Field(description="Generated in this run.")
    accepted_prediction_tokens: int = Field(description="Of them, accepted drafts, as far as the engine reports them.")
    rejected_prediction_tokens: int = Field(description="Rejected drafts, as far as the engine reports them.")


def run_batch(
    source: Path,
    output: Path,
    model: str,
    load: Callable[[], Session],
    settings: ServerSettings | None = None,
    *,
    ray: RayWorkers | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> BatchSummary:
    """Answer the requests of a file that have no answer yet in the file of answers.

    Whatever interrupts it, the file of answers holds whole lines, and no ``custom_id`` twice; the same call goes on
    where it was. Lines that failed with status 408, 429 or 500 and above are done again by the next call.

    Args:
        source: Requests in OpenAI's batch format, one JSON object a line.
        output: Where answers go, one a line, in the order in which they are ready.
        model: What requests call the model, unless ``settings.names`` says.
        load: Loads the session, and loads it again if its engine's process ends. With ``ray`` it is pickled, and
            called on each worker.
        settings: Names, defaults and limits, as of the server.
        ray: Workers of a Ray cluster; None: one session in this process.
        say: Gets lines for the user.

    Raises:
        InvalidRequestError: A file cannot be used, or a line of ``source`` is no request: nothing was run.
        PolydraftError: As ``load``; or the disk is full, or the engine is lost: what was done is kept.
    """
    settings = settings or ServerSettings()
    if not settings.names:
        settings = settings.model_copy(update={"names": (model,)})
    requests = RequestsFile(source, {"names": settings.names, "defaults": settings.defaults})
    with AnswersFile(output, requests) as answers:
        counter = _Counter(len(requests), answers, say)
        if counter.left:
            if ray is None:
                _answer_here(requests.without(answers.done), load, settings, counter, say)
            else:
                _answer_on_ray(requests, answers, load, settings, ray, counter)
        return counter.summary()


def _answer_here(
    todo: Iterator[RequestLine],
    load: Callable[[], Session],
    settings: ServerSettings,
    counter: _Counter,
    say: Callable[[str], None],
) -> None:
    async def work(session: Session) -> None:
        async with Answering(session, load, settings) as answering, aclosing(answering.answers(todo)) as answers:
            async for answer in answers:
                counter.add(answer)

    session = load()
    try:
        if note := settings.note(session):
            say(note)
        counter.start()
        asyncio.run(work(session))
    finally:
        session.close()


def _answer_on_ray(
    requests: RequestsFile,
    answers: AnswersFile,
    load: Callable[[], Session],
    settings: ServerSettings,
    ray: RayWorkers,
    counter: _Counter,
) -> None:
    """Go on as long as that leads on: what was lost with a machine is done once more."""
    counter.start()
    while left := counter.left:
        try:
            for answer in answers_of_workers(requests.without(answers.done), load, settings, ray):
                counter.add(answer)
        except EngineError:
            if counter.left == left:
                raise
        else:
            if counter.left == left:
                raise EngineError(
                    f"{left} lines came back without an answer.", "Answers so far are kept. Run the same command again."
                )


class _Counter:
    """Writes answers, counts them, and tells how far it is."""

    def __init__(self, total: int, answers: AnswersFile, say: Callable[[str], None]) -> None:
        self._total = total
        self._answers = answers
        self._say = say
        self._before = len(answers.done)
        self._tokens = self._accepted = self._rejected = 0
        self.start()
        if self._before:
            say(f"{self._before} of {total} lines are done already.")

    @property
    def left(self) -> int:
        """Lines without an answer."""
        return self._total - len(self._answers.done)

    def start(self) -> None:
        """Begin to count seconds."""
        self._began = self._told = time.monotonic()

    def add(self, answer: dict[str, Any]) -> None:
        """Write and count an answer, unless there is one to its request."""
        if not self._answers.add(answer):
            return
        usage = answer["response"]["body"].get("usage") or {}
        details = usage.get("completion_tokens_details") or {}
        self._tokens += usage.get("completion_tokens") or 0
        self._accepted += details.get("accepted_prediction_tokens") or 0
        self._rejected += details.get("rejected_prediction_tokens") or 0
        now = time.monotonic()
        if now - self._told >= _TOLD_EVERY:
            self._told = now
            speed = self._tokens / (now - self._began)
            self._say(f"{len(self._answers.done)} of {self._total} lines, {speed:.1f} tokens/s")

    def summary(self) -> BatchSummary:
        """The counts."""
        completed = sum(self._answers.done.values())
        return BatchSummary(
            total=self._total,
            completed=completed,
            failed=len(self._answers.done) - completed,
            done_before=self._before,
            seconds=time.monotonic() - self._began,
            completion_tokens=self._tokens,
            accepted_prediction_tokens=self._accepted,
            rejected_prediction_tokens=self._rejected,
        )
