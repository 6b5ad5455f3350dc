"""``Session``: what an app holds. Whole engines subclass it and implement ``rounds`` and ``close_engine``."""

from __future__ import annotations

import asyncio
import secrets
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from polydraft import reasons
from polydraft.contract.requests import TokenRequest
from polydraft.contract.results import Chunk, GenerationResult, Round, RunningInfo
from polydraft.errors import (
    ContextLengthError,
    InvalidRequestError,
    SessionClosedError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft.session.arguments import CallArguments, shows_arguments
from polydraft.session.forks import HomeProcess
from polydraft.session.inside import Inside
from polydraft.session.settings import check_some_token_left, check_supported, effective_settings
from polydraft.session.slots import CallSlot, busy_error, current_thread_owner
from polydraft.session.stream import Generation, TokenStream
from polydraft.session.watch import AcceptanceWatch
from polydraft.text.ids_only import IdsOnlyTokenizer
from polydraft.text.prompts import encode_prompt
from polydraft.text.tracker import OutputTracker

if TYPE_CHECKING:
    from polydraft.contract.records import Capabilities
    from polydraft.contract.requests import GenerationSettings, OffReason, Prompt, Speculate
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["Session"]

_TURNS = 20  # of the event loop


class Session(ABC):
    """A loaded target with its drafter. Made by ``polydraft.load``; a context manager.

    Safe to use from several threads: ``running.concurrency`` says whether calls wait for one another (``serial``) or
    make progress together (``concurrent``). A session cannot be used in a forked process.

    Args:
        tokenizer: The target's tokenizer.
        running: What really runs.
        capabilities: The backend's.
    """

    def __init__(self, tokenizer: Tokenizer, running: RunningInfo, capabilities: Capabilities) -> None:
        self._tokenizer = tokenizer
        if isinstance(tokenizer, IdsOnlyTokenizer):
            running = running.model_copy(update={"notes": (*running.notes, tokenizer.note)})
        self._running = running
        self._capabilities = capabilities
        self._slot = CallSlot(serial=running.concurrency == "serial")
        self._home = HomeProcess()
        self._inside = Inside()
        self._closed = False
        self._engine_to_close = False
        # Reentrant: a signal handler may close the session while its thread does.
        self._close_lock = threading.RLock()
        self._under_way: set[Generation] = set()
        self._streams: weakref.WeakSet[TokenStream] = weakref.WeakSet()
        self._streams_lock = threading.RLock()
        self._watch = AcceptanceWatch(running)

    # What a whole engine implements ---------------------------------------------------------------------------------

    @abstractmethod
    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Generate. Yield what each round (or engine output) emitted.

        Push every emitted token into ``generation.tracker`` in order; when a push returns a reason, that token is the
        last one: yield the round cut there, and return. Look at ``generation.cancelled`` between engine calls. The
        iterator is closed (``GeneratorExit``) when the caller closes the stream: free the request then.

        A concurrent engine may hand the request over as soon as this is called, and return an iterator with a
        ``close`` of its own: ``generate_many`` calls it for all prompts before it reads the first, so that they share
        the engine's batches. Its rounds then tell their ``seconds``.
        """

    @abstractmethod
    def close_engine(self) -> None:
        """Free the engine. Called once, when no call is under way."""

    def speculation_conflict(self, settings: GenerationSettings) -> OffReason | None:
        """Why these settings cannot be combined with speculation here; None if they can."""
        return None

    def check_settings(self, settings: GenerationSettings) -> None:
        """Refuse settings that the engine would not honour as they are. Called before any work.

        Raises:
            UnsupportedError: By default, for settings that the capabilities do not claim.
        """
        check_supported(settings, self._capabilities, self._running.backend)

    # What an app uses -----------------------------------------------------------------------------------------------

    @property
    def running(self) -> RunningInfo:
        """What really runs: engine and version, pair, effective k, dtype, device, method."""
        return self._running

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's tokenizer."""
        return self._tokenizer

    @shows_arguments
    def generate(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> GenerationResult:
        """Generate to the end.

        Args:
            prompt: Text (raw, with BOS once), chat messages, or token ids.
            max_new_tokens: And the other settings: see ``GenerationSettings``, which holds the defaults.
            min_new_tokens: Tokens before which nothing ends the output.
            temperature: 0 is greedy.
            top_p: Nucleus.
            top_k: 0 keeps all.
            min_p: Relative to the largest probability.
            repetition_penalty: Of tokens that prompt or output have; above 1 discourages (Transformers, vLLM).
            presence_penalty: Of tokens that the output has, -2 to 2 (OpenAI, vLLM).
            frequency_penalty: The same, times their number in the output.
            logit_bias: Token id -> number from -100 to 100, added to its logit.
            banned_token_ids: Tokens that are never chosen.
            forced_token_ids: Index in the output, from 0 -> the token there.
            logits_processor: ``(prefix_ids, logits) -> logits``, a pure function, or an object that has ``accept`` and
                ``rollback`` as well: see ``polydraft.contract.processors``.
            acceptance: ``exact-match``, or ``rejection``, which is **not seed-identical**: see ``Acceptance``.
            seed: Drawn if None; the result tells it.
            stop: Stop strings.
            stop_token_ids: Ids that end the output.
            ignore_eos: Go on after end-of-sequence ids.
            logprobs: How many best tokens to report at each position.
            speculate: ``auto`` never fails for want of speculation and says why it is off; ``on`` refuses instead.
            tools: Tool schemas for the chat template.
            chat_template_kwargs: For the chat template, such as ``{"enable_thinking": True}``.

        Raises:
            InvalidRequestError: A setting or the prompt is wrong.
            UnsupportedError: A setting is none that the backend honours.
            ContextLengthError: The prompt does not fit.
            SpeculationUnavailableError: ``speculate="on"``, and it cannot.
            EngineError: The engine failed; ``partial_text`` holds what there was.
            LogitsProcessorError: The logits processor failed, or gave logits that cannot be used.
            SessionBusyError: Called by a logits processor of this session, or while this thread holds an unfinished
                stream of a session whose calls are serial.
            SessionClosedError: The session is closed.
            ForkedSessionError: It was loaded in another process.
        """
        stream = self._stream(prompt, arguments)
        for _ in stream:
            pass
        assert stream.result is not None
        return stream.result

    @shows_arguments
    def stream(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> TokenStream:
        """Generate as an iterator of chunks, one a round. Arguments and errors are those of ``generate``.

        The arguments are checked now; the engine starts with the first chunk. Closing the iterator cancels at once.
        """
        return self._stream(prompt, arguments)

    @shows_arguments
    def generate_many(self, prompts: Sequence[Prompt], **arguments: Unpack[CallArguments]) -> list[GenerationResult]:
        """Generate for each prompt; results in the prompts' order.

        Prompt i draws from noise stream i of the one seed: equal prompts give different samples, and the first result
        is that of ``generate``. An engine that batches by itself works on all of them at once, any other on one after
        the other. Keyword arguments are those of ``generate``. All prompts are checked before any runs.
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise InvalidRequestError("generate_many takes a sequence of prompts.", "For one prompt use generate.")
        if arguments.get("seed") is None:
            arguments["seed"] = _draw_seed()
        streams = [self._stream(prompt, arguments, noise_stream=index) for index, prompt in enumerate(prompts)]
        results = []
        try:
            if self._running.concurrency == "concurrent":
                for stream in streams:
                    stream.start()
            for stream in streams:
                for _ in stream:
                    pass
                assert stream.result is not None
                results.append(stream.result)
        finally:
            for stream in streams[len(results) :]:  # one failed: the others must not go on unread
                stream.close()
        return results

    @shows_arguments
    async def agenerate(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> GenerationResult:
        """``generate`` for an event loop; cancelling the task cancels the generation."""
        stream = self._stream(prompt, arguments)
        async with aclosing(self._iterate(stream)) as chunks:
            async for _ in chunks:
                pass
        assert stream.result is not None
        return stream.result

    @shows_arguments
    async def astream(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> AsyncGenerator[Chunk]:
        """``stream`` for an event loop; closing the async iterator cancels."""
        async with aclosing(self._iterate(self._stream(prompt, arguments))) as chunks:
            async for chunk in chunks:
                yield chunk

    def cancel(self) -> None:
        """Cancel all calls under way, from any thread. The session stays usable.

        Raises:
            ForkedSessionError: The session belongs to the parent process.
        """
        self._home.check()
        for stream in self._open_streams():
            stream.cancel()

    def close(self) -> None:
        """Cancel all calls and free the engine. May be called twice.

        Called from inside a step (by a logits processor or a signal handler) it does not wait: calls end, and the
        engine is freed, when the steps under way are over. In a forked process it does nothing: the engine is the
        parent's.
        """
        if not self._home.is_here:
            return
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        streams = self._open_streams()
        for stream in streams:
            stream.cancel()  # all first: one may wait for another to end
        for stream in streams:
            stream.close()
        self._engine_to_close = True
        self._close_idle_engine()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # How a call runs ------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        self._home.check()
        if self._closed:
            raise SessionClosedError("This session is closed.", "Load a new one with polydraft.load.")

    def _stream(self, prompt: Prompt, arguments: CallArguments, *, noise_stream: int = 0) -> TokenStream:
        self._check_usable()
        self._inside.check()
        given = dict(arguments)
        for name in ("speculate", "tools", "chat_template_kwargs"):
            given.pop(name, None)
        vocab_size = self._tokenizer.vocab_size
        settings = effective_settings(given, vocab_size)
        self.check_settings(settings)
        if settings.stop and isinstance(self._tokenizer, IdsOnlyTokenizer):
            raise UnsupportedError(
                "Stop strings were given, and this model has no tokenizer to find them.", "Give stop_token_ids."
            )
        encoded = encode_prompt(
            prompt,
            self._tokenizer,
            tools=arguments.get("tools"),
            chat_template_kwargs=arguments.get("chat_template_kwargs"),
            vocab_size=vocab_size,
        )
        context = self._running.context_length
        if len(encoded.token_ids) >= context:
            raise ContextLengthError(
                f"The prompt has {len(encoded.token_ids)} tokens, and the context holds {context}, output included.",
                "Shorten the prompt, or load the model with a larger context_length if it has one.",
            )
        room = min(settings.max_new_tokens, context - len(encoded.token_ids))
        off = self._off_reason(arguments.get("speculate", "auto"), settings, room)
        request = TokenRequest(
            prompt_token_ids=encoded.token_ids,
            settings=settings,
            seed=_draw_seed() if settings.seed is None else settings.seed,
            stream=noise_stream,
            speculate=off is None,
            num_speculative_tokens=self._running.num_speculative_tokens if off is None else 0,
            eos_token_ids=frozenset() if settings.ignore_eos else self._tokenizer.eos_token_ids,
            max_total_tokens=context,
        )
        check_some_token_left(settings, {*request.eos_token_ids, *settings.stop_token_ids}, vocab_size)
        tracker = OutputTracker(self._tokenizer, request, parse_chat=encoded.is_chat)
        stream = TokenStream(
            Generation(request, tracker, self._running, off),
            self._begin,
            self._acquire_for_thread,
            self._finished,
            self._inside,
        )
        with self._streams_lock:
            self._streams.add(stream)
        return stream

    def _open_streams(self) -> list[TokenStream]:
        with self._streams_lock:
            return list(self._streams)

    def _off_reason(self, speculate: Speculate, settings: GenerationSettings, room: int) -> OffReason | None:
        """Why not to speculate; ``room`` is how many tokens may come."""
        if speculate not in ("auto", "on", "off"):
            raise InvalidRequestError(f"speculate is {speculate!r}.", "Give 'auto', 'on' or 'off'.")
        if speculate == "off":
            return reasons.by_caller("speculate='off'")
        off = None
        if self._running.method is None or self._running.num_speculative_tokens == 0:
            off = self._running.speculation_off or reasons.no_drafter(self._running.target)
        elif room <= 2:  # the first is prefill's, the last one a bonus token
            off = reasons.too_few_tokens()
        else:
            off = self.speculation_conflict(settings)
        if off is not None and speculate == "on":
            raise SpeculationUnavailableError(
                f"speculate='on', but speculation is off: {off.message}", "Use speculate='auto' to decode plainly."
            )
        return off

    def _acquire_for_thread(self, given_up: Callable[[], bool]) -> bool:
        self._check_usable()
        if not self._slot.acquire(current_thread_owner(), given_up):
            return False
        try:
            self._check_usable()  # it may have been closed meanwhile
        except BaseException:
            self._slot.release()
            raise
        return True

    def _begin(self, generation: Generation) -> Iterator[Round]:
        self._under_way.add(generation)
        return self.rounds(generation)

    def _finished(self, generation: Generation) -> None:
        self._under_way.discard(generation)
        self._slot.release()
        self._watch.add(generation)
        self._close_idle_engine()

    def _close_idle_engine(self) -> None:
        """Close the engine once ``close`` has asked for it and no call uses it."""
        with self._close_lock:
            if not self._engine_to_close or self._under_way:
                return
            self._engine_to_close = False
        self.close_engine()

    async def _iterate(self, stream: TokenStream) -> AsyncGenerator[Chunk]:
        """Drive a stream in worker threads; the event loop waits for the slot itself, so no worker is blocked by it."""
        owner: Hashable = ("task", asyncio.current_task())
        took = held = False

        def use_held_slot(given_up: Callable[[], bool]) -> bool:
            nonlocal held
            self._check_usable()
            held = False
            return True

        stream.use_slot(use_held_slot)
        try:
            took = held = await self._wait_for_slot(owner, stream)
            while True:
                chunk = await asyncio.to_thread(next, stream, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            if took and self._slot.held_by(owner):
                self._slot.leave()
            stream.cancel()
            await _to_the_end(asyncio.to_thread(stream.close))
            if held:
                self._slot.release()

    async def _wait_for_slot(self, owner: Hashable, stream: TokenStream) -> bool:
        """Take the slot; False if the call is cancelled while it waits."""
        tries = 0
        while not self._slot.try_acquire(owner):
            if stream.cancelled:
                return False
            # A stream that this task dropped gives the slot back within a few turns of the event loop.
            if tries > _TURNS and self._slot.held_by(owner):
                raise busy_error("task")
            tries += 1
            await asyncio.sleep(0.002)
        return True


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for ``work`` however often the waiting task is cancelled, and only then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _draw_seed() -> int:
    return secrets.randbelow(2**32)
