"""A batch on the machines of a Ray cluster: Ray Data maps sessions over blocks of lines.

Ray starts workers again that die, with their machine or alone, and repeats their blocks. The process that started the
batch alone writes, and leaves out answers that it has: nothing is lost, and nothing is doubled.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import islice
from typing import Any

from polydraft import Session
from polydraft.errors import EngineError, PolydraftError
from pydantic import BaseModel, ConfigDict, Field

from polydraft_server.batch.answering import Answering
from polydraft_server.batch.requests_file import RequestLine
from polydraft_server.settings import ServerSettings

__all__ = ["RayWorkers", "answers_of_workers"]


class RayWorkers(BaseModel):
    """Workers of a Ray cluster, each with a session."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(default="local", description="Of the cluster; local: one is started on this machine; auto.")
    workers: int = Field(default=1, ge=1, description="Sessions; Ray places them on the machines.")
    cpus: float = Field(default=1.0, ge=0, description="CPUs that each takes of its machine's.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that each takes, and sees.")
    block: int = Field(default=64, ge=1, description="Lines that a worker gets at a time, and again if one dies.")


class _Worker:
    """One session, in a process of Ray's."""

    def __init__(self, load: Callable[[], Session], settings: ServerSettings) -> None:
        self._loop = asyncio.new_event_loop()
        self._answering = Answering(load(), load, settings)
        self._loop.run_until_complete(self._answering.__aenter__())

    def __call__(self, block: Any) -> Any:
        """The answers to a block of lines, both as Arrow tables."""
        import pyarrow

        answers = self.answers(block["line"].to_pylist())
        return pyarrow.table({"answer": pyarrow.array(answers, pyarrow.large_string())})

    def answers(self, lines: list[str]) -> list[str]:
        """The answers to lines; both are JSON, the lines that of ``_packed``."""

        async def work() -> list[str]:
            asked = iter([RequestLine(*json.loads(line)) for line in lines])
            return [json.dumps(answer) async for answer in self._answering.answers(asked)]

        return self._loop.run_until_complete(work())


def _packed(line: RequestLine) -> str:
    return json.dumps(astuple(line))


def answers_of_workers(
    lines: Iterator[RequestLine], load: Callable[[], Session], settings: ServerSettings, workers: RayWorkers
) -> Iterator[dict[str, Any]]:
    """The answers to lines, as they become ready; one may come twice if a worker has died.

    Args:
        lines: They wait in Ray's object store, which puts on the disk what its memory does not hold.
        load: Loads a worker's session. Where an engine may end its process, it should load it into one of its own
            (``isolation="process"``), so that the line that ends it is found.
        settings: As of ``Answering``.
        workers: How many, and where.

    Raises:
        EngineError: A worker cannot load its session, has lost its engine, or Ray has lost answers.
        PolydraftError: Ray is not installed, or the cluster is not there.
    """
    try:
        import pyarrow
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise PolydraftError(
            f"Ray Data is not installed: there is no module {error.name}.",
            'Install it on all machines: `pip install "polydraft-server[ray]"`.',
        ) from error
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=workers.address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise PolydraftError(
                f"There is no Ray cluster at {workers.address}: {_last_line(error)}",
                "Start one (`ray start --head`), or give its address, HOST:PORT.",
            ) from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = []
        while block := list(islice(lines, workers.block)):
            blocks.append(ray.put(pyarrow.table({"line": [*map(_packed, block)]})))
        answers = ray.data.from_arrow_refs(blocks).map_batches(
            _Worker,
            fn_constructor_args=(load, settings),
            batch_size=None,  # a block
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers.workers),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus or None,
        )
        for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
            for answer in batch["answer"]:
                yield json.loads(answer.as_py())
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"The workers of the Ray cluster failed: {_last_line(error)}",
            "Answers so far are kept. Mend it, and run the same command again.",
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _last_line(error: BaseException) -> str:
    """What an error of Ray says after the tracebacks of its workers."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
