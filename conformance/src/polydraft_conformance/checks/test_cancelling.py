"""Cancelling: in a prefill, early, often, and what it leaves behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.errors import PolydraftError

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.counting import stepping_engine, wrapped_sequences
from polydraft_conformance.evidence import greedy_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft import Session
    from polydraft.contract import EngineSequence, GenerationResult

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain", "test_closing_a_stream_cancels")
_PATIENCE = 20.0
"""Seconds without any progress that count as a hang."""
_CANCELS = 200
_WARM = 40
"""Cancels after which an engine has made the threads, buffers and files that it keeps."""
_LEAK = 4
"""One thread, file or cache lost in this many cancels is a leak; fewer may be a pool that grows."""
_TRIES = 8
"""How often a request is made that is to be cancelled in its prefill: on a busy machine it may end before."""
_UNDER_WAY = 4
"""Chunks that may still come after a cancel: they were made before it."""


@check(scope="once", after=_AFTER)
def test_cancelling_in_prefill(polydraft_bench: Bench) -> None:
    """A request cancelled before its first chunk ends as cancelled, and the next one is not hit by it.

    Proves: cancelling before the engine has begun gives no token; cancelling a long prompt's prefill from another
    thread, by the stream and by the session, ends the stream with reason ``cancelled`` and true counts; the next
    request gives its known output.
    A failure means: the engine's flag of a cancelled request is not cleared, or what its prefill had stored is read.
    Look at: where the engine looks at ``Generation.cancelled`` (``check_cancelled`` of a sequence), and what it frees.
    """
    session, known = polydraft_bench.session, _Known(polydraft_bench)
    room = session.running.context_length
    prompt = polydraft_bench.prompt(max(2, min(500, room // 2)), 1)
    settings = greedy_settings(min(300, room - len(prompt) - 1))
    random = polydraft_bench.random("cancelling in prefill")
    stream = session.stream(prompt, **settings)
    stream.cancel()
    count = sum(len(chunk.token_ids) for chunk in stream)
    _expect_cancelled(stream.result, "before its first chunk")
    expect(count == 0, f"A request that was cancelled before its first chunk gave {count} tokens.")
    known.expect_again("a request that was cancelled before its first chunk")
    for way in ("stream.cancel()", "session.cancel()", "stream.close()"):
        ignored = 0
        for attempt in range(_TRIES):
            stream = session.stream(prompt, **settings)
            given: list[float] = []  # when each chunk came
            cancelled: list[float] = []

            def read(stream: Any = stream, given: list[float] = given) -> None:
                given.extend(time.monotonic() for _ in stream)

            def cancel(stream: Any = stream, way: str = way, cancelled: list[float] = cancelled) -> None:
                ways = {"stream.cancel()": stream.cancel, "session.cancel()": session.cancel}
                ways.get(way, stream.close)()
                cancelled.append(time.monotonic())

            reader = _started(read)
            time.sleep(random.uniform(0.0, 0.01 / 2**attempt))
            canceller = _started(cancel)
            for thread, what in ((canceller, f"{way} during the prefill"), (reader, f"The stream after {way}")):
                thread.join(_PATIENCE * 2)
                if thread.is_alive():
                    polydraft_bench.suite.abandon()
                    raise AssertionError(f"{what} of a long prompt does not return within {_PATIENCE * 2:g} s.")
            if stream.result is None or stream.result.finish_reason != "length":
                break
            # It went on although it was cancelled; or it had ended before, or its thread started after that.
            late = sum(when > cancelled[0] for when in given) if cancelled else 0
            ignored += late > _UNDER_WAY
        else:
            polydraft_bench.numbers[f"ended_before_{way}"] = _TRIES - ignored
            if ignored <= _TRIES // 2:
                continue
        _expect_cancelled(stream.result, f"by {way} during its prefill")
        known.expect_again(f"{way} during a prefill")


@check(
    scope="once",
    after=(
        *_AFTER,
        "test_cancelling_in_prefill",
        "test_cancelling_from_another_thread",
        "test_statistics_equal_counts",
    ),
    time_factor=3,
)
def test_cancelling_two_hundred_times(polydraft_bench: Bench) -> None:
    """Two hundred requests that are cancelled early leave no slot, thread, file or cache behind.

    Proves: streams are closed, cancelled, dropped, left by an exception or by ``session.cancel()`` after their first
    chunk or before it, some several at once; each ends as ``cancelled``. Later requests work and give the same, and
    threads, open files and live sequences are not more than before.
    A failure means: the engine frees a request only when it has ended by itself.
    Look at: what happens when the iterator of ``rounds`` is closed early, and ``close`` of a sequence.
    """
    known = _Known(polydraft_bench)
    work = _Cancels(polydraft_bench)
    worker = _started(work.run)
    seen, since = -1, time.monotonic()
    while worker.is_alive():
        worker.join(0.5)
        if work.done != seen:
            seen, since = work.done, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            polydraft_bench.suite.abandon()
            raise AssertionError(
                f"A cancelled request keeps its slot: after {work.done} cancels the next request hangs "
                f"({_PATIENCE:g} s without progress; the last one was {work.way})."
            )
    expect(work.error is None, f"A cancelled request keeps its slot: after {work.done} cancels {work.error}")
    polydraft_bench.numbers["cancels"] = work.done
    for name, lost in work.lost().items():
        polydraft_bench.numbers[f"more_{name.replace(' ', '_')}"] = lost
        expect(
            lost < (work.done - _WARM) / _LEAK,
            f"Every cancel leaves something behind: {lost} more {name} after {work.done - _WARM} cancels.",
        )
    known.expect_again(f"{work.done} cancelled requests")


class _Known:
    """A request whose output is known, to be made again."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.result = bench.evidence.runs[1].speculative

    def expect_again(self, after: str) -> None:
        """It ends by itself, with the same tokens, in reasonable time."""
        count = len(self.result.token_ids)
        found: list[GenerationResult] = []
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                found.append(self.bench.session.generate(list(self.result.prompt_token_ids), **greedy_settings(count)))
            except BaseException as error:  # a thread's error would else only be printed
                errors.append(error)

        thread = _started(generate)
        thread.join(3 * _PATIENCE)
        if thread.is_alive():
            self.bench.suite.abandon()
            raise AssertionError(f"After {after} the next request hangs.")
        expect(not errors, f"After {after} the next request fails: {errors}.")
        reason = found[0].finish_reason
        expect(reason == "length", f"After {after} the next request ends with {reason!r}: the cancel hit it, too.")
        self.bench.same(
            self.result,
            found[0],
            wrong=f"After {after} the next request gives another output than before.",
            names=("before", "after"),
        )


class _Cancels:
    """Makes and cancels requests, in a thread of its own: it may hang."""

    def __init__(self, bench: Bench) -> None:
        self.session: Session = bench.session
        self.engine = stepping_engine(bench.session)
        self.together = 4 if bench.session.running.concurrency == "concurrent" else 1
        random = bench.random("cancels")
        self.count = _CANCELS + random.randint(0, 20)
        # Short prompts, not all alike: a prefill is what a cancel costs.
        self.prompts = [bench.prompt(random.randint(3, 9), variant) for variant in range(7)]
        self.settings = greedy_settings(min(200, bench.session.running.context_length - 10))
        self.done = 0
        self.way = ""
        self.error: str | None = None
        self.sequences: weakref.WeakSet[EngineSequence] = weakref.WeakSet()
        self.before: dict[str, int] = {}

    def run(self) -> None:
        """All of them."""
        try:
            with self._watched():
                for number in range(self.count):
                    if number == _WARM:
                        self.before = self._held()
                    ways = (self._closed, self._cancelled, self._dropped, self._left, self._unread, self._all)
                    self.way = (ways[number % len(ways)].__name__).strip("_")
                    ways[number % len(ways)](self.prompts[number % len(self.prompts)])
                    self.done = number + 1
        except AssertionError as error:
            self.error = f"one is not what it should be: {error}"
        except Exception as error:
            self.error = f"the next request fails: {type(error).__name__}: {error}"

    def lost(self) -> dict[str, int]:
        """What there is more of than after the first ones."""
        for _ in range(20):  # threads may take a moment to end
            after = self._held()
            found = {name: after[name] - count for name, count in self.before.items()}
            if max(found.values()) < self.count // (2 * _LEAK):
                break
            time.sleep(0.1)
        return found

    def _held(self) -> dict[str, int]:
        gc.collect()
        held = {"threads": threading.active_count(), "sequences in memory": len(self.sequences)}
        files = Path("/proc/self/fd")
        if files.is_dir():
            held["open files"] = sum(1 for _ in files.iterdir())
        return held

    def _watched(self) -> Any:
        """Remembers every sequence of a stepping engine as long as anything refers to it."""
        if self.engine is None:
            return nullcontext()

        def wrap(inner: EngineSequence) -> EngineSequence:
            with suppress(TypeError):  # no weak references to it
                self.sequences.add(inner)
            return inner

        return wrapped_sequences(self.engine, wrap)

    def _stream(self, prompt: list[int]) -> Any:
        stream = self.session.stream(prompt, **self.settings)
        next(stream)
        return stream

    def _closed(self, prompt: list[int]) -> None:
        stream = self._stream(prompt)
        stream.close()
        _expect_cancelled(stream.result, "by close()")

    def _cancelled(self, prompt: list[int]) -> None:
        stream = self._stream(prompt)
        stream.cancel()
        for _ in stream:
            pass
        _expect_cancelled(stream.result, "by cancel()")

    def _dropped(self, prompt: list[int]) -> None:
        stream = self._stream(prompt)
        del stream

    def _left(self, prompt: list[int]) -> None:
        stream = self.session.stream(prompt, **self.settings)
        with suppress(_LeftError), stream:
            for _ in stream:
                raise _LeftError
        _expect_cancelled(stream.result, "by an exception of its reader")

    def _unread(self, prompt: list[int]) -> None:
        stream = self.session.stream(prompt, **self.settings)
        stream.close()

    def _all(self, prompt: list[int]) -> None:
        streams = [self._stream(prompt) for _ in range(self.together)]
        self.session.cancel()
        for stream in streams:
            for _ in stream:
                pass
            _expect_cancelled(stream.result, "by session.cancel()")


class _LeftError(Exception):
    """Raised by a reader in the middle of a stream."""


def _expect_cancelled(result: GenerationResult | None, how: str) -> None:
    """The result of a cancelled request says so, and counts its tokens."""
    expect(result is not None, f"A request that was cancelled {how} has no result.")
    assert result is not None
    expect(
        result.finish_reason == "cancelled",
        f"A request that was cancelled {how} ended with {result.finish_reason!r} after {len(result.token_ids)} tokens.",
    )
    stats = result.stats
    expect(
        stats.num_tokens == len(result.token_ids),
        f"A request that was cancelled {how} counts {stats.num_tokens} tokens, its result has {len(result.token_ids)}.",
    )
    expect(
        (stats.num_accepted_tokens or 0) <= stats.num_tokens,
        f"A request that was cancelled {how} counts {stats.num_accepted_tokens} accepted drafts in {stats.num_tokens} "
        "tokens.",
    )


def _started(work: Callable[[], Any]) -> threading.Thread:
    """``work`` in a thread that does not keep the process alive."""

    def run() -> None:
        with suppress(PolydraftError):  # what a cancelled call raises shows in its result
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
