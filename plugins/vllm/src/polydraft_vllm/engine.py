"""One vLLM engine and the thread that steps it: requests of all callers share its continuous batching.

Only that thread touches vLLM. Callers hand it commands and read the outputs of their request from a queue.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from polydraft.errors import EngineError, SessionClosedError

from polydraft_vllm.process_lock import VLLM_LOCK

__all__ = ["StepOutput", "Ticket", "VllmEngine", "open_engines", "shut_down"]

_engines: weakref.WeakSet[VllmEngine] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one engine step gave one request."""

    token_ids: tuple[int, ...]
    num_draft_tokens: int
    num_sampled: int
    """Tokens that came out of the verifier: accepted drafts and one more. More than ``token_ids`` where vLLM cut."""
    logprobs: Sequence[Any] | None
    """vLLM's: for each token a dict of token id -> Logprob."""
    seconds: float
    """Since the request's previous output; for the first one, since it was submitted."""
    finish_reason: str | None
    """vLLM's: stop, length, abort, ...; None while it goes on."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A submitted request."""

    id: str
    submitted: float
    outputs: queue.SimpleQueue[StepOutput | BaseException] = field(default_factory=queue.SimpleQueue)
    internal_id: str = ""
    latest: float = 0.0
    finished: bool = False

    def next(self, timeout: float) -> StepOutput | None:
        """The next output; None if there is none yet.

        Raises:
            BaseException: What made the request or the engine fail.
        """
        try:
            output = self.outputs.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(output, BaseException):
            raise output
        return output


class VllmEngine:
    """Owns a ``vllm.v1.engine.llm_engine.LLMEngine`` whose scheduler is polydraft's and lives in this process.

    Args:
        engine: The engine, idle.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._scheduler = engine.engine_core.engine_core.scheduler
        self._commands: deque[tuple[str, Any, Any]] = deque()
        self._wake = threading.Condition()
        self._tickets: dict[str, Ticket] = {}
        self._ids = itertools.count()
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="polydraft-vllm", daemon=True)
        self._thread.start()
        _engines.add(self)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._stopping

    @property
    def num_unfinished(self) -> int:
        """Requests that vLLM has not finished; 0 when all have ended and been aborted."""
        running, waiting = self._scheduler.get_request_counts()
        return int(running) + int(waiting) + len(self._commands)

    def submit(self, prompt: Any, params: Any) -> Ticket:
        """Hand a request over; returns at once. A refusal by vLLM comes out of the ticket.

        Args:
            prompt: vLLM's prompt, such as ``TokensPrompt``.
            params: ``SamplingParams`` with ``output_kind=DELTA``.

        Raises:
            EngineError: The engine has died.
            SessionClosedError: It has been closed.
        """
        ticket = Ticket(f"polydraft-{next(self._ids)}", time.perf_counter())
        ticket.latest = ticket.submitted
        with self._wake:
            if self._failure is not None:
                raise self._dead()
            if self._stopping:
                raise SessionClosedError("This engine is closed.", "Load a new session with polydraft.load.")
            self._commands.append(("add", ticket, (prompt, params)))
            self._wake.notify()
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """Drop a request, whatever its state; returns at once."""
        if ticket.finished:
            return
        with self._wake:
            self._commands.append(("abort", ticket, None))
            self._wake.notify()

    def close(self) -> None:
        """Stop the thread and free the engine. May be called twice."""
        with self._wake:
            if self._stopping:
                return
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        engine, self._engine, self._scheduler = self._engine, None, None
        with VLLM_LOCK:
            shut_down(engine, alone=not open_engines())

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        except BaseException as error:  # vLLM is unusable from here on: every caller is told
            self._fail(error)

    def _serve(self) -> bool:
        """Wait for work, obey commands, make one step. False when the engine shall stop."""
        with self._wake:
            while not self._stopping and not self._commands and not self._tickets:
                self._wake.wait()
            if self._stopping:
                return False
            commands, self._commands = self._commands, deque()
        for name, ticket, what in commands:
            if name == "add":
                self._add(ticket, *what)
            elif self._tickets.pop(ticket.id, None) is not None:
                with VLLM_LOCK:
                    self._engine.abort_request([ticket.id])
        # Also with no request of ours left: the scheduler tells the workers of aborted requests in its next step.
        if self._engine.has_unfinished_requests() or commands:
            self._step()
        return True

    def _add(self, ticket: Ticket, prompt: Any, params: Any) -> None:
        try:
            ticket.internal_id = self._engine.add_request(ticket.id, prompt, params)
        except (ValueError, TypeError, NotImplementedError) as error:
            ticket.finished = True
            ticket.outputs.put(
                EngineError(f"vLLM refuses the request: {error}", "Change the setting that it names, or leave it out.")
            )
            return
        self._tickets[ticket.id] = ticket

    def _step(self) -> None:
        with VLLM_LOCK:
            outputs = self._engine.step()
        now = time.perf_counter()
        drafted = self._scheduler.drafted
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is None:
                continue
            completion = output.outputs[0]
            token_ids = tuple(completion.token_ids)
            drafts, sampled = drafted.get(ticket.internal_id, (0, len(token_ids)))
            reason = completion.finish_reason if output.finished else None
            step = StepOutput(
                token_ids, drafts, max(sampled, len(token_ids)), completion.logprobs, now - ticket.latest, reason
            )
            ticket.latest = now
            if output.finished:
                ticket.finished = True
                del self._tickets[ticket.id]
            ticket.outputs.put(step)

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self._failure = error
            commands, self._commands = self._commands, deque()
        waiting = [*self._tickets.values(), *(ticket for name, ticket, _ in commands if name == "add")]
        self._tickets.clear()
        for ticket in waiting:
            ticket.finished = True
            ticket.outputs.put(self._dead())

    def _dead(self) -> EngineError:
        error = self._failure
        dead = EngineError(
            f"vLLM's engine died: {type(error).__name__}: {error}", "Close the session and load the pair again."
        )
        dead.__cause__ = error
        return dead


def shut_down(engine: Any, *, alone: bool) -> None:
    """Free an engine. vLLM's own shutdown also destroys the process groups, which other engines here may use.

    Args:
        engine: The ``LLMEngine``.
        alone: Whether no other engine of this process is open.
    """
    if alone:
        engine.engine_core.shutdown()
        return
    client = engine.engine_core
    client._finalizer.detach()  # else its collection would make up for what is left out here
    client.engine_core.structured_output_manager.clear_backend()
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    gc.unfreeze()


def open_engines() -> list[VllmEngine]:
    """The engines of this process that have not been closed."""
    return [engine for engine in _engines if not engine.closed]


os.register_at_fork(after_in_child=_engines.clear)  # the parent closes them; a lock may be held here for ever


@atexit.register
def _close_all() -> None:
    """A thread inside native code, or a worker process left behind, would hinder the interpreter's end."""
    for engine in list(_engines):
        engine.close()
