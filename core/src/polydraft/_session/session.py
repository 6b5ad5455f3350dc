"""``Session``, the object that apps hold: it has an engine, and turns calls into requests for it."""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack, final

from polydraft import reasons
from polydraft._loop.kept import KeptSequences
from polydraft._loop.rounds import stepping_rounds
from polydraft._loop.schedule import SessionSchedule
from polydraft._numbers import as_int, shown
from polydraft._session.arguments import CallArguments, call_arguments
from polydraft._session.async_stream import AsyncTokenStream
from polydraft._session.call import Call
from polydraft._session.call_lock import CallLock, current_thread_owner
from polydraft._session.engine_check import check_engine
from polydraft._session.failures import as_engine_errors
from polydraft._session.guards import StepGuard
from polydraft._session.guided import about_calls, check_guided_settings, guided_call, tool_choice_of
from polydraft._session.monitor import AcceptanceMonitor
from polydraft._session.prompt_tokenizer import PromptTokenizer
from polydraft._session.settings import check_some_token_left, check_supported, effective_settings
from polydraft._session.stream import TokenStream, read_together
from polydraft.contract.requests import OffReason, TokenRequest
from polydraft.contract.results import GenerationResult, Round, RunningInfo
from polydraft.contract.stepping import SteppingEngine
from polydraft.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    SessionClosedError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft.sampling.structured import Grammars
from polydraft.text._prompts import encode_prompt
from polydraft.text._tracker import OutputTracker
from polydraft.text.ids_only import IdsOnlyTokenizer

if TYPE_CHECKING:
    from polydraft._loop.schedule import Schedule
    from polydraft.contract.records import Capabilities
    from polydraft.contract.requests import GenerationSettings, Prompt, Speculate
    from polydraft.contract.tokenizer import Tokenizer
    from polydraft.contract.whole import WholeEngine
    from polydraft.text._response_template import ResponseTemplate
    from polydraft.text._template_habits import Habits

__all__ = ["Session"]


@final
class Session:
    """A loaded target with its drafter. Created by ``polydraft.load``; a context manager.

    Safe to use from several threads: ``running.concurrency`` says whether calls wait for one another (``serial``) or
    make progress together (``concurrent``). A session cannot be used in a forked process.

    Args:
        engine: The loaded engine; the session closes it.
        running: What really runs: ``engine.running``, completed by the checks after loading.
        capabilities: What the backend claims; other settings are refused.
        prefix_cache_bytes: As in the request that was loaded; 0: no call leaves anything behind.

    Raises:
        PluginError: The engine breaks the contract.
    """

    def __init__(
        self,
        engine: SteppingEngine | WholeEngine,
        running: RunningInfo,
        capabilities: Capabilities,
        *,
        prefix_cache_bytes: int | None = 0,
    ) -> None:
        check_engine(engine, running, capabilities)
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._running = running
        self._capabilities = capabilities
        self.spells_ids = False
        """Where ``token_ids`` would be None, as the engine gives text and its tokens are not certain: give those that
        its tokenizer makes of each piece of the text."""
        self._lock = CallLock(serial=running.concurrency == "serial")
        self._guard = StepGuard(os.getpid())
        self._closed = False
        self._engine_to_close = False
        # Reentrant: a signal handler may close the session while its thread does.
        self._close_lock = threading.RLock()
        # Calls that the engine works on; ``close`` frees the engine once this is empty.
        self._in_progress: set[Call] = set()
        # Weak: collecting a stream that the caller dropped is what closes it.
        self._streams: weakref.WeakSet[TokenStream] = weakref.WeakSet()
        # Reentrant: a signal handler may cancel the session while its thread adds a stream.
        self._streams_lock = threading.RLock()
        self._monitor = AcceptanceMonitor(running)
        self.schedule: Schedule | None = None
        """Picks k for each round, where that is asked for; sessions of one engine may share it."""
        self._kept: KeptSequences | None = None
        if isinstance(engine, SteppingEngine):
            self._kept = KeptSequences(engine, capabilities, prefix_cache_bytes)
        if isinstance(engine, SteppingEngine) and running.max_speculative_tokens is not None:
            self.schedule = SessionSchedule(min(running.max_speculative_tokens, engine.max_draft_tokens))
        self._grammars = Grammars(engine.tokenizer)
        self._template_habits: Habits = {}

    def __repr__(self) -> str:
        return f"<Session {self._running.line}{', closed' if self._closed else ''}>"

    def _repr_html_(self) -> str:
        return self._running._repr_html_()

    @property
    def running(self) -> RunningInfo:
        """What really runs: engine and version, pair, effective k, dtype, device, method."""
        return self._running

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's tokenizer."""
        return self._tokenizer

    @property
    def engine(self) -> SteppingEngine | WholeEngine:
        """The loaded engine, for tools that measure it, such as the conformance suite."""
        return self._engine

    def forget_prefixes(self) -> None:
        """Free the KV that is kept for later turns. Calls under way are not concerned.

        For memory, and before a tool opens sequences of the engine itself: some engines hold one at a time.
        """
        if self._kept is not None:
            self._kept.clear()

    @call_arguments
    def generate(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> GenerationResult:
        """Generate to the end.

        Args:
            prompt: Text (raw, with BOS once), chat messages, or token ids.
            max_new_tokens: Maximum number of tokens to generate, EOS included. This and the arguments up to
                ``logprobs`` are ``GenerationSettings``, which holds their defaults.
            min_new_tokens: EOS and stop ids are suppressed until this many tokens have been generated.
            temperature: 0 is greedy: the largest logit, lowest id on a tie.
            top_p: Keep the most likely tokens that hold this share of the probability.
            top_k: Keep the k largest logits; 0 keeps all.
            min_p: Drop tokens below min_p times the largest probability.
            typical_p: Keep the tokens whose information is nearest to the entropy, up to this share of the probability.
            repetition_penalty: Divides positive and multiplies negative logits of tokens in the prompt or the output;
                above 1 discourages them.
            presence_penalty: Subtracted from the logits of tokens in the output.
            frequency_penalty: Subtracted from a token's logit once per occurrence in the output.
            logit_bias: Token id -> number from -100 to 100, added to its logit.
            banned_token_ids: Tokens that are never chosen.
            forced_token_ids: Index in the output, from 0 -> the token there, whatever the logits and other settings.
            logits_processor: A pure function ``(prefix_ids, logits) -> logits``, or an object with
                ``accept(token_id)`` and ``rollback(num_tokens)`` as well, such as a grammar.
            guided: What the output must match: ``{"json": schema}``, ``{"regex": text}``, ``{"choice": [text, ...]}``
                or ``{"grammar": text}``. ``result.matches`` says whether it ended by itself.
            response_format: The same in OpenAI's words: ``{"type": "json_schema", "json_schema": {"schema": ...}}``,
                ``{"type": "json_object"}``; or a pydantic model.
            acceptance: When a draft is accepted under sampling: ``exact-match``, or ``rejection`` (rejection sampling),
                which is **not seed-identical**.
            seed: None: one is drawn; the result reports it.
            stop: Stop strings; ``text`` ends before the match, ``token_ids`` include it.
            stop_token_ids: Tokens that end the output.
            ignore_eos: Continue after end-of-sequence ids.
            logprobs: Report log-probabilities of the chosen token and of this many top candidates.
            speculate: ``auto``: speculate where possible, and report why where not. ``on``: raise an error where not,
                and draft in every round with ``num_speculative_tokens="auto"``, too. ``off``: plain decoding.
            num_speculative_tokens: k of this call, from 1 to the session's own; None: the session's.
            tools: Tool schemas for the chat template.
            tool_choice: ``auto``; ``none``: the model is not shown the tools; ``required``: it calls at least one of
                them, ``{"name": ...}``: this one.
            chat_template_kwargs: Variables for the chat template, such as ``{"enable_thinking": True}``.
            continue_final_message: The last message, which is the assistant's, is the start of the answer: the model
                continues it, and the result holds only what comes after it.

        Raises:
            InvalidRequestError: A setting or the prompt is wrong.
            UnsupportedError: The backend does not support a setting.
            ContextLengthError: The prompt does not fit.
            SpeculationUnavailableError: ``speculate="on"``, and speculation is not possible.
            EngineError: The engine failed; ``partial_text`` holds the text so far. ``EngineCrashedError``: its worker
                process has ended.
            NonFiniteLogitsError: Target or drafter computed NaN or infinite logits: overflow, or damaged weights.
            LogitsProcessorError: The logits processor failed, or returned unusable logits.
            StructuredOutputError: The output cannot go on as ``guided`` asks.
            SessionBusyError: Called by a logits processor of this session, or while this thread holds an unfinished
                stream of a session whose calls are serial.
            SessionClosedError: The session is closed.
            ForkedSessionError: The session was loaded in another process.
        """
        # Closed even if an interrupt comes between two chunks: a kept traceback would keep the stream, and its lock.
        with self._stream(prompt, arguments) as stream:
            for _ in stream:
                pass
        assert stream.result is not None
        return stream.result

    @call_arguments
    def stream(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> TokenStream:
        """Generate as an iterator of chunks, one per round. Arguments and errors are those of ``generate``.

        The arguments are checked now; the engine starts with the first chunk. ``cancel()`` of the iterator ends this
        call only, from any thread; closing it cancels at once.
        """
        return self._stream(prompt, arguments)

    @call_arguments
    def generate_many(self, prompts: Sequence[Prompt], **arguments: Unpack[CallArguments]) -> list[GenerationResult]:
        """Generate for each prompt; results in the prompts' order.

        Prompt i uses noise stream i of the same seed: equal prompts give different samples, and the first result is
        that of ``generate``. An engine works on all prompts at once where that is faster, else on one after the other.
        Keyword arguments and errors are those of ``generate``. All prompts are checked before any runs.
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise InvalidRequestError("generate_many takes a sequence of prompts.", "For one prompt use generate.")
        # One seed for all prompts, which differ by noise stream: one number then repeats the whole list. It is no
        # setting: a backend that takes no seeds may ignore it.
        drawn = _draw_seed()
        streams = [self._stream(prompt, arguments, noise_stream=at, drawn=drawn) for at, prompt in enumerate(prompts)]
        results = []
        try:
            if self._running.concurrency == "concurrent":
                for stream in streams:
                    stream.start()
                # A processor may keep a state, which is the caller's: it is not used by several threads.
                if arguments.get("logits_processor") is None:
                    read_together(streams, self._engine.shared_sequences)
            for stream in streams:
                for _ in stream:
                    pass
                assert stream.result is not None
                results.append(stream.result)
        finally:
            for stream in streams[len(results) :]:  # after an error, which says more: stop the others
                with suppress(EngineError):
                    stream.close()
        return results

    @call_arguments
    async def agenerate(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> GenerationResult:
        """``generate`` for an event loop; cancelling the task cancels the generation."""
        async with AsyncTokenStream(self._stream(prompt, arguments), self._lock) as stream:
            async for _ in stream:
                pass
        assert stream.result is not None
        return stream.result

    @call_arguments
    def astream(self, prompt: Prompt, **arguments: Unpack[CallArguments]) -> AsyncTokenStream:
        """``stream`` for an event loop: an asynchronous iterator of chunks.

        The arguments are checked now. ``cancel()`` of the iterator ends this call only, from any task or thread;
        ``aclose()`` cancels and waits until the engine has stopped.
        """
        return AsyncTokenStream(self._stream(prompt, arguments), self._lock)

    def cancel(self) -> None:
        """Cancel all calls under way, from any thread. The session stays usable.

        Raises:
            ForkedSessionError: The session belongs to the parent process.
        """
        self._guard.check_home()
        for stream in self._open_streams():
            stream.cancel()

    def close(self) -> None:
        """Cancel all calls and free the engine. May be called twice; if freeing it failed, that is tried again.

        Called from inside a step (by a logits processor or a signal handler) it does not wait: calls end, and the
        engine is freed, when the steps under way are over. In a forked process it does nothing: the engine belongs to
        the parent.
        """
        if not self._guard.is_home:
            return
        with self._close_lock:
            if self._closed and not self._engine_to_close:
                return
            self._closed = True
        streams = self._open_streams()
        for stream in streams:
            stream.cancel()  # all of them before closing any: one may wait for another to end
        # Each step runs even if one before fails or is interrupted; the last one added runs first.
        with ExitStack() as steps:
            # If a step of the engine is still under way (this call came from inside it), its end frees the engine.
            steps.callback(self._close_idle_engine)
            self._engine_to_close = True
            for stream in streams:
                steps.callback(stream.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # How a call runs ------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        self._guard.check_home()
        if self._closed:
            raise SessionClosedError("This session is closed.", "Load a new one with polydraft.load.")

    def _stream(
        self, prompt: Prompt, arguments: CallArguments, *, noise_stream: int = 0, drawn: int | None = None
    ) -> TokenStream:
        """A call's stream; ``drawn`` is the seed where the arguments give none."""
        self._check_usable()
        # A logits processor that calls its session fails here, not at the first chunk.
        self._guard.check()
        given = dict(arguments)
        taken = ("speculate", "num_speculative_tokens", "tools", "tool_choice")
        for name in (*taken, "chat_template_kwargs", "continue_final_message"):
            given.pop(name, None)
        vocab_size = self._tokenizer.vocab_size
        settings = effective_settings(given, vocab_size)
        tools = arguments.get("tools")
        tool_choice = tool_choice_of(arguments.get("tool_choice"), tools)
        if tool_choice not in ("auto", "none") and "guided" not in self._capabilities.sampling:
            raise UnsupportedError(
                f"The backend {self._running.backend} does not support a `tool_choice` that forces a call.",
                "Give 'auto' or 'none', or choose another backend (`polydraft backends` lists them).",
            )
        self._check_settings(settings)
        if settings.stop and isinstance(self._tokenizer, IdsOnlyTokenizer):
            raise UnsupportedError(
                "Stop strings were given, and this model has no tokenizer to find them.", "Give `stop_token_ids`."
            )
        continued = arguments.get("continue_final_message")
        encoded = encode_prompt(
            prompt,
            PromptTokenizer(self._tokenizer, self._running),
            tools=None if tool_choice == "none" else tools,
            chat_template_kwargs=arguments.get("chat_template_kwargs"),
            continue_final_message=False if continued is None else continued,
            habits=self._template_habits,
            vocab_size=vocab_size,
        )
        with as_engine_errors(self._running, "in describing its tokens"):
            template = arguments.get("chat_template_kwargs")
            guided = guided_call(settings.guided, encoded, tool_choice, self._tokenizer, template)
        if guided is not settings.guided:
            forced = settings.guided is None
            settings = settings.model_copy(update={"guided": guided})
            try:
                self._check_settings(settings)
            except InvalidRequestError as error:
                raise about_calls(error) if forced else error from None
        context = self._running.context_length
        text_only = bool(getattr(self._tokenizer, "text_only", False))  # ids are no tokens: the engine counts them
        if len(encoded.token_ids) >= context and not text_only:
            raise ContextLengthError(
                f"The prompt has {len(encoded.token_ids)} tokens, and the context holds {context}, output included.",
                "Shorten the prompt, or load the model with a larger `context_length` if it has one.",
            )
        room = settings.max_new_tokens if text_only else min(settings.max_new_tokens, context - len(encoded.token_ids))
        off = self._off_reason(arguments.get("speculate", "auto"), settings, room)
        with as_engine_errors(self._running, "in describing its tokens"):
            ends = frozenset(self._tokenizer.eos_token_ids)
        asked = self._asked_k(arguments.get("num_speculative_tokens"))
        k, least = self._k(settings, arguments.get("speculate") == "on", asked) if off is None else (0, None)
        request = TokenRequest(
            prompt_token_ids=encoded.token_ids,
            settings=settings,
            seed=settings.seed if settings.seed is not None else _draw_seed() if drawn is None else drawn,
            stream=noise_stream,
            speculate=off is None,
            num_speculative_tokens=k,
            least_speculative_tokens=least,
            # Ignored means unknown: neither ``min_new_tokens`` nor the end of the output then looks at EOS.
            eos_token_ids=frozenset() if settings.ignore_eos else ends,
            max_total_tokens=context,
        )
        check_some_token_left(settings, {*request.eos_token_ids, *settings.stop_token_ids}, vocab_size)
        with as_engine_errors(self._running, "in describing its tokens"):
            tracker = OutputTracker(
                self._tokenizer,
                request,
                parse_chat=encoded.is_chat,
                response_template=self._response_template if encoded.is_chat else None,
                tools=encoded.tools,
            )
        stream = TokenStream(
            Call(request, tracker, self._running, off, spells_ids=self.spells_ids),
            self._start,
            self._acquire,
            self._release,
            self._finished,
            self._guard,
        )
        with self._streams_lock:
            self._streams.add(stream)
        return stream

    def _check_settings(self, settings: GenerationSettings) -> None:
        """Refuse what the backend does not support, and what no output could match."""
        in_worker = self._running.process == "worker"
        check_supported(settings, self._capabilities, self._running.backend, in_worker=in_worker)
        check_guided_settings(settings)
        if not isinstance(self._engine, SteppingEngine):
            with as_engine_errors(self._running, "in its check_settings()"):
                self._engine.check_settings(settings)
        elif settings.guided is not None:
            with as_engine_errors(self._running, "in describing its tokens"):
                self._grammars.check(settings.guided)

    @cached_property
    def _response_template(self) -> ResponseTemplate | None:
        """How the checkpoint says that its answers are parsed, if it does."""
        spec = getattr(self._tokenizer, "response_template", None)
        if spec is None:
            return None
        from polydraft.text._response_template import ResponseTemplate

        return ResponseTemplate(spec, self._tokenizer)

    def _open_streams(self) -> list[TokenStream]:
        with self._streams_lock:
            return list(self._streams)

    def _off_reason(self, speculate: Speculate, settings: GenerationSettings, room: int) -> OffReason | None:
        """Why this call does not speculate, or None; ``room`` is how many tokens it may generate."""
        if speculate not in ("auto", "on", "off"):
            raise InvalidRequestError(f"`speculate` is {speculate!r}.", "Give 'auto', 'on' or 'off'.")
        if speculate == "off":
            return reasons.by_caller("`speculate='off'`")
        off = None
        if self._running.method is None or self._running.num_speculative_tokens == 0:
            off = self._running.speculation_off or reasons.no_drafter(self._running.target)
        elif room <= 2:  # prefill chooses the first, and the last is a bonus token: none is left to draft
            off = reasons.too_few_tokens()
        elif not isinstance(self._engine, SteppingEngine):
            with as_engine_errors(self._running, "in its speculation_conflict()"):
                off = self._engine.speculation_conflict(settings)
                if not isinstance(off, OffReason | None):
                    raise TypeError(f"it gave a {type(off).__name__}, not an OffReason")
        if off is not None and speculate == "on":
            raise SpeculationUnavailableError(
                f"`speculate='on'` was given, but speculation is off: {off.message}",
                "Use `speculate='auto'` to decode plainly.",
            )
        return off

    def _asked_k(self, given: object) -> int | None:
        """The k that a call asks for; None if it asks for none, or for what the session does anyway."""
        if given is None:
            return None
        k, largest = as_int(given), self._running.max_draft_tokens
        if k is None or k < 1 or k > largest > 0:
            raise InvalidRequestError(
                f"`num_speculative_tokens={shown(given)}` is not allowed in a call of this session.",
                f"Give a whole number from 1 to {largest}; for more, load the session with more."
                if largest
                else "Give a whole number from 1 on.",
                argument="num_speculative_tokens",
            )
        engine = self._engine
        if not (isinstance(engine, SteppingEngine) or engine.picks_k or largest in (k, 0)):
            raise UnsupportedError(
                f"The backend {self._running.backend} has one k for all calls of a session, here {largest}, and "
                f"`num_speculative_tokens={k}` was given.",
                "Leave it out, or load a session with that k.",
            )
        return k

    def _k(self, settings: GenerationSettings, must_draft: bool, asked: int | None) -> tuple[int, int | None]:
        """The k of a call, or the largest and the smallest k of its rounds."""
        if asked is not None:
            return asked, None
        largest = self._running.max_speculative_tokens
        # Rejection sampling gives other tokens with another k: there a seed would not repeat what time decides.
        if largest is None or (settings.acceptance == "rejection" and settings.temperature > 0):
            return self._running.num_speculative_tokens, None
        return largest, int(must_draft)

    def _acquire(self, call: Call) -> bool:
        """Take the lock for a call, as its thread unless its task has taken it; False if it is cancelled meanwhile."""
        self._check_usable()
        if not self._lock.acquire(call, current_thread_owner(), call.cancelled):
            return False
        self._check_usable()  # it may have been closed meanwhile; the end of the stream releases the lock
        return True

    def _start(self, call: Call) -> Iterator[Round]:
        self._in_progress.add(call)
        engine = self._engine
        if isinstance(engine, SteppingEngine):
            assert self._kept is not None
            return stepping_rounds(engine, call, self._kept, self.schedule, self._grammars)
        return engine.rounds(call)

    def _release(self, call: Call) -> None:
        """The engine no longer works on a call. May be called twice."""
        try:
            self._in_progress.discard(call)
        finally:
            self._lock.release(call)

    def _finished(self, call: Call, started: bool) -> None:
        """After ``_release``, since a warning filter may turn the monitor's warning into an error.

        Args:
            call: The call that has ended.
            started: Whether the engine may have worked on it.
        """
        try:
            if started:
                self._monitor.add(call)
        finally:
            self._close_idle_engine()

    def _close_idle_engine(self) -> None:
        """Close the engine once ``close`` has asked for it and no call uses it."""
        with self._close_lock:
            if not self._engine_to_close or self._in_progress:
                return
            self._engine_to_close = False
        # Outside the lock and by one caller only: freeing an engine may take seconds.
        try:
            with as_engine_errors(self._running, "in its close()"):
                if self._kept is not None:
                    self._kept.close()
                self._engine.close()
        except BaseException:
            self._engine_to_close = True
            raise


def _draw_seed() -> int:
    return secrets.randbelow(2**32)
