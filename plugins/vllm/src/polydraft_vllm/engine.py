"""The in-process engine, and the thread that steps it: requests of all callers share its continuous batching.

Only that thread touches vLLM. Callers give it commands, and read the outputs of their request from a queue.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polydraft.contract import Round, WholeEngine
from polydraft.errors import EngineError, SessionClosedError

from polydraft_vllm.process_lock import VLLM_LOCK
from polydraft_vllm.rounds import Rounds, StepOutput, Ticket, sampling_params
from polydraft_vllm.settings import check_settings

if TYPE_CHECKING:
    from polydraft.contract import Generation, GenerationSettings, RunningInfo, Tokenizer

__all__ = ["VllmEngine", "open_engines", "shut_down"]

_engines: weakref.WeakSet[VllmEngine] = weakref.WeakSet()


class VllmEngine(WholeEngine):
    """Owns an idle ``vllm.v1.engine.llm_engine.LLMEngine`` whose scheduler, polydraft's, lives in this process."""

    def __init__(self, engine: Any, tokenizer: Tokenizer, running: RunningInfo) -> None:
        self.tokenizer = tokenizer
        self.running = running
        self._engine = engine
        # The first ``engine_core`` is vLLM's client, which in process holds the second, the core itself.
        self._core = engine.engine_core.engine_core
        self._scheduler = self._core.scheduler
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
        # A queued ``add`` is not in the scheduler yet, and a queued ``abort`` still is.
        return int(running) + int(waiting) + len(self._commands)

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Submit the request at once; the engine works on it whether or not the iterator is read.

        What vLLM refuses is raised by the iterator.
        """
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(generation.request.prompt_token_ids))
        params = sampling_params(generation.request)
        ticket = Ticket(f"polydraft-{next(self._ids)}", latest=time.perf_counter())
        with self._wake:
            if self._failure is not None:
                raise self._dead()
            if self._stopping:
                raise SessionClosedError("This engine is closed.", "Load a new session with polydraft.load.")
            self._commands.append(("add", ticket, (prompt, params)))
            self._wake.notify()
        return Rounds(generation, ticket, self._abort, self.running.dtype)

    def check_settings(self, settings: GenerationSettings) -> None:
        """Refuse what vLLM would change or refuse itself: see ``settings.check_settings``."""
        check_settings(settings, speculates=self.running.method is not None)

    def _abort(self, ticket: Ticket) -> None:
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
        # Before VLLM_LOCK is taken: the thread needs it to end its last step.
        self._thread.join()
        engine, self._engine, self._core, self._scheduler = self._engine, None, None, None
        with VLLM_LOCK:
            shut_down(engine, alone=not open_engines())
        del engine
        gc.collect()

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        except BaseException as error:  # vLLM is unusable from here on: every caller gets the error
            self._fail(error)

    def _serve(self) -> bool:
        """Wait for work, carry out commands, run one step. False once the engine is to stop."""
        with self._wake:
            while not self._stopping and not self._commands and not self._tickets and not self._core.batch_queue:
                self._wake.wait()
            if self._stopping:
                return False
            commands = len(self._commands)
        for _ in range(commands):
            # It is left in the queue until it has been carried out: if that fails, ``_fail`` answers it, too.
            name, ticket, what = self._commands[0]
            if name == "add":
                self._add(ticket, *what)
            elif self._tickets.pop(ticket.id, None) is not None:
                with VLLM_LOCK:
                    self._engine.abort_request([ticket.id])
            self._commands.popleft()
        # Also if no request is left: the scheduler reports aborted requests to the workers in its next step, and steps
        # that asynchronous scheduling began before it knew that a request had ended still hold KV blocks.
        if self._engine.has_unfinished_requests() or commands or self._core.batch_queue:
            self._step()
        return True

    def _add(self, ticket: Ticket, prompt: Any, params: Any) -> None:
        try:
            ticket.internal_id = self._engine.add_request(ticket.id, prompt, params)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            with VLLM_LOCK:
                self._engine.abort_request([ticket.id])  # a part of vLLM may know it already
            hint = "Change the setting that it names, or leave it out."
            if isinstance(error, ImportError):  # what structured outputs need is imported with the first of them
                hint = "Install vLLM with all that it depends on, or leave out the setting that needs it."
            ticket.finished = True
            ticket.outputs.put(EngineError(f"vLLM refuses the request: {error}", hint))
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
            # Keyed by the scheduler's id, not by ours.
            drafts, sampled = drafted.get(ticket.internal_id, (0, len(token_ids)))
            reason = completion.finish_reason if output.finished else None
            step = StepOutput(
                token_ids,
                drafts,
                max(sampled, len(token_ids)),
                completion.logprobs,
                now - ticket.latest,
                reason,
                output.num_cached_tokens,
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
        # Requests that vLLM runs, and those that it has not been given yet.
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
    """Free an ``LLMEngine``; ``alone``: no other one is open in this process.

    vLLM's own shutdown also destroys the process groups, which other engines may be using.
    """
    if alone:
        engine.engine_core.shutdown()
        return
    client = engine.engine_core
    if (finalizer := getattr(client, "_finalizer", None)) is not None:  # since vLLM 0.31
        finalizer.detach()  # else its collection would do what is left out here
    client.engine_core.structured_output_manager.clear_backend()
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    # vLLM freezes the objects of its start-up, and frozen objects are never collected.
    gc.unfreeze()


def open_engines() -> list[VllmEngine]:
    """The engines of this process that have not been closed."""
    return [engine for engine in _engines if not engine.closed]


os.register_at_fork(after_in_child=_engines.clear)  # the parent closes them; a lock may be held here forever


@atexit.register
def _close_all() -> None:
    """A thread in native code, or a worker process that is left, would keep the interpreter from exiting."""
    for engine in list(_engines):
        engine.close()
