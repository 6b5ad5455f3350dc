"""Sessions: streams, cancelling, several at once, closing, loading again."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

from polydraft.errors import SessionBusyError, SessionClosedError

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft.contract import GenerationResult

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain")
_LONG = greedy_settings(400)
_STREAMED, _AGAIN = ("whole", "streamed"), ("before", "afterwards")
_PATIENCE = 20.0
"""Seconds to wait for another thread."""


@check(scope="kind", after=(*_AFTER, "test_statistics_equal_counts"))
def test_stream_is_the_result_in_pieces(polydraft_bench: Bench) -> None:
    """Chunks joined are the result: tokens, text, accepted drafts; the last one says why it ended.

    Proves: A stream and a whole result tell the same: tokens, text, accepted drafts, and one reason of the end.
    A failure means: Chunks are missing, repeated or counted differently.
    Look at: In a whole engine, `rounds`: each round is yielded once, before the next is emitted. The text comes from
    `Tokenizer.token_bytes`.
    """
    result, prompt, settings = _known(polydraft_bench)
    pieces = streamed(polydraft_bench.session, prompt, **settings)
    # Another call may flip a near tie: so the chunks are compared with the result of their own call, and this with it.
    polydraft_bench.same(result, pieces.token_ids, wrong="A stream gives another output than a call.", names=_STREAMED)
    result = pieces.result
    expect(pieces.token_ids == result.token_ids, "The tokens of all chunks are not those of the result.")
    expect(pieces.text == result.text, f"The text of all chunks is {pieces.text!r}, not {result.text!r}.")
    reasons = [chunk.finish_reason for chunk in pieces.chunks if chunk.finish_reason]
    expect(reasons == [result.finish_reason], f"Chunks say the finish reasons {reasons}, not {[result.finish_reason]}.")
    expect(pieces.chunks[-1].finish_reason is not None, "The last chunk does not say why the output ended.")
    for chunk in pieces.chunks:
        expect(
            "".join(segment.text for segment in chunk.segments) in (chunk.text, ""),
            "Segments are not the chunk's text.",
        )
        accepted = chunk.num_accepted_tokens
        expect(
            accepted is None or 0 <= accepted <= len(chunk.token_ids),
            f"A chunk of {len(chunk.token_ids)} tokens has {accepted} accepted ones.",
        )
    reported = [chunk.num_accepted_tokens for chunk in pieces.chunks]
    if None not in reported and result.stats.num_accepted_tokens is not None:
        total = sum(count or 0 for count in reported)
        expect(
            total == result.stats.num_accepted_tokens,
            f"Chunks report {total} accepted drafts, the result {result.stats.num_accepted_tokens}.",
        )


@check(scope="kind", after=_AFTER)
def test_closing_a_stream_cancels(polydraft_bench: Bench) -> None:
    """Closing the iterator ends it at once, closing twice is harmless, and the session continues unaffected.

    Proves: A caller may stop at any time: what was read is the beginning of the output, and the next call is not
    affected.
    A failure means: Tokens came out after the end, or the next output is another one: the cancelled call left something
    behind.
    Look at: What happens on `GeneratorExit` in `WholeEngine.rounds`, and in `EngineSequence.close`.
    """
    result, prompt, _ = _known(polydraft_bench)
    for chunks in (1, 3):
        stream = polydraft_bench.session.stream(prompt, **_LONG)
        read = [token for _ in range(chunks) for token in next(stream).token_ids]
        stream.close()
        stream.close()
        more = sum(len(chunk.token_ids) for chunk in stream)
        expect(more == 0, f"A closed stream gave {more} more tokens.")
        polydraft_bench.same(
            result,
            read[: len(result.token_ids)],
            wrong="A stream that is closed early gave other tokens than the result.",
            length=len(read),
            names=("whole", "closed early"),
        )
    _expect_usable(polydraft_bench)


@check(scope="once", after=_AFTER)
def test_cancelling_from_another_thread(polydraft_bench: Bench) -> None:
    """A stream that another thread closes or cancels ends soon, and the session continues.

    Proves: `stream.close()` and `session.cancel()` take effect from another thread, soon, and leave the session usable.
    A failure means: The engine went on to the end, the call that cancels did not return, or later outputs changed.
    Look at: `Generation.cancelled()`, which a whole engine must look at between outputs; locks that are held during a
    step.
    """
    _, prompt, _ = _known(polydraft_bench)
    for name in ("stream.close()", "session.cancel()"):
        stream = polydraft_bench.session.stream(prompt, **_LONG)
        first = next(stream)
        errors: list[BaseException] = []
        cancel = stream.close if name == "stream.close()" else polydraft_bench.session.cancel
        canceller = _in_thread(cancel, errors)
        count = len(first.token_ids) + sum(len(chunk.token_ids) for chunk in stream)
        canceller.join(_PATIENCE)
        expect(not canceller.is_alive(), f"{name} from another thread does not return.")
        expect(not errors, f"{name} from another thread raised {errors}.")
        expect(count < _LONG["max_new_tokens"], f"{name} from another thread did not cancel the stream.")
        result = stream.result
        expect(result is not None and result.finish_reason == "cancelled", f"After {name} the result is {result}.")
    _expect_usable(polydraft_bench)


@check(scope="once", after=_AFTER)
def test_interleaved_streams(polydraft_bench: Bench) -> None:
    """Two streams of one session, read in turn, give their own outputs; a serial session says that it is busy.

    Proves: Two streams that are read in turn do not mix; a session that cannot do that says so with `SessionBusyError`.
    A failure means: Sequences share state, or `RunningInfo.concurrency` says "concurrent" of an engine that is not.
    Look at: What sequences of one engine share: caches, buffers, the drafter's state; `RunningInfo.concurrency` and
    `SteppingEngine.max_sequences`.
    """
    session = polydraft_bench.session
    first, prompt, settings = _known(polydraft_bench, 0)
    second, other_prompt, other_settings = _known(polydraft_bench)
    one = session.stream(prompt, **settings)
    with closing(one):
        read = list(next(one).token_ids)
        try:
            other = session.stream(other_prompt, **other_settings)
            found = list(next(other).token_ids)
        except SessionBusyError:
            expect(
                session.running.concurrency == "serial",
                "The session says that its calls run concurrently, but refuses a second stream.",
            )
        else:
            going = [(one, read), (other, found)]
            while going:
                for stream, tokens in list(going):
                    chunk = next(stream, None)
                    if chunk is None:
                        going.remove((stream, tokens))
                    else:
                        tokens.extend(chunk.token_ids)
            expect(tuple(read) == first.token_ids, "The first of two interleaved streams gave another output.")
            expect(tuple(found) == second.token_ids, "The second of two interleaved streams gave another output.")
    _expect_usable(polydraft_bench)


@check(scope="once", after=_AFTER)
def test_several_threads(polydraft_bench: Bench) -> None:
    """Concurrent calls return the same results as sequential ones.

    Proves: Calls from several threads give what they give one after another.
    A failure means: The engine is not safe to be called by several threads, or calls wait for each other for ever.
    Look at: `RunningInfo.concurrency`: with "serial" the core runs one call at a time. Otherwise the engine's own locks
    and shared buffers.
    """
    runs = polydraft_bench.evidence.runs[:3]
    found: dict[int, tuple[int, ...]] = {}
    errors: list[BaseException] = []

    def work(index: int) -> Callable[[], None]:
        def call() -> None:
            _, prompt, settings = _known(polydraft_bench, index)
            found[index] = polydraft_bench.session.generate(prompt, **settings).token_ids

        return call

    threads = [_in_thread(work(index), errors) for index in range(len(runs))]
    for thread in threads:
        thread.join(_PATIENCE * 3)
    expect(not any(thread.is_alive() for thread in threads), "Calls of several threads block one another for ever.")
    expect(not errors, f"A concurrent call raised {errors}.")
    for index, run in enumerate(runs):
        expect(found[index] == run.speculative.token_ids, "A call among several threads gave another output.")


@check(scope="once", after=_AFTER)
def test_async_twins(polydraft_bench: Bench) -> None:
    """Agenerate and astream give what generate gives.

    Proves: `agenerate` and `astream` give what `generate` gives.
    A failure means: The engine behaves differently when it is called in another thread than the one that loaded it.
    Look at: State that is bound to a thread: devices, streams, event loops.
    """
    session = polydraft_bench.session
    result, prompt, settings = _known(polydraft_bench)

    async def both() -> tuple[tuple[int, ...], list[int]]:
        whole = await session.agenerate(prompt, **settings)
        pieces = [token async for chunk in session.astream(prompt, **settings) for token in chunk.token_ids]
        return whole.token_ids, pieces

    for name, found in zip(("agenerate", "astream"), asyncio.run(both()), strict=True):
        wrong = f"{name} gives another output than generate."
        polydraft_bench.same(result, found, wrong=wrong, names=("generate", name))


@check(scope="once", after=_AFTER)
def test_two_sessions_at_once(polydraft_bench: Bench) -> None:
    """Two sessions with different drafters give their own outputs while both generate.

    Proves: Two sessions of one target with different drafters do not influence each other.
    A failure means: Sessions share state that they change: module globals, the weights, a cache.
    Look at: Module-level state of the plugin and the engine; models that are loaded once and patched for one session.
    """
    pair = polydraft_bench.case.pair
    first, prompt, settings = _known(polydraft_bench)
    with (
        closing(polydraft_bench.suite.load(pair.case(1, pair.kinds[-1]))) as other,
        closing(polydraft_bench.session.stream(prompt, **settings)) as one,
    ):
        read = list(next(one).token_ids)
        second = other.generate(prompt, **settings)
        read += [token for chunk in one for token in chunk.token_ids]
        expect(tuple(read) == first.token_ids, "A second session changed the first one's output.")
        # With another k near ties may flip, in the prompt's KV, too: the second session's own steps show it.
        polydraft_bench.on(other).same(
            first,
            second,
            wrong="The second session's output is another one.",
            names=("first session", "second session"),
        )
    _expect_usable(polydraft_bench)


@check(scope="once", after=_AFTER)
def test_close_and_load_again(polydraft_bench: Bench) -> None:
    """close() may be called twice, a closed session says so, its streams end, and the pair can be loaded again.

    Proves: `close()` ends streams, may be called twice, frees what is needed to load again, and the pair then gives the
    same output.
    A failure means: A closed session can still be used, closing fails, or something of the first session is left over.
    Look at: `SteppingEngine.close` or `WholeEngine.close`, and what is kept between two loads.
    """
    first, prompt, settings = _known(polydraft_bench)
    session = polydraft_bench.suite.load(polydraft_bench.case)
    stream = session.stream(prompt, **_LONG)
    next(stream)
    session.close()
    session.close()
    try:
        more = sum(len(chunk.token_ids) for chunk in stream)
        expect(more < _LONG["max_new_tokens"] // 2, "Closing the session did not end its stream.")
    except SessionClosedError:
        pass
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: session.generate(prompt, **settings),
        "stream": lambda: list(session.stream(prompt, **settings)),
    }
    for name, call in calls.items():
        try:
            call()
        except SessionClosedError:
            continue
        raise AssertionError(f"{name}() of a closed session did not raise SessionClosedError.")
    with polydraft_bench.opened() as again:
        found = again.session.generate(prompt, **settings)
    polydraft_bench.same(first, found, wrong="The pair, loaded again, gives another output.", names=_AGAIN)


@check(scope="once", after=_AFTER)
def test_many_prompts(polydraft_bench: Bench) -> None:
    """generate_many gives the results of single calls, in order.

    Proves: `generate_many` gives each prompt's own output, in the order of the prompts.
    A failure means: Prompts in one batch influence each other or are mixed up.
    Look at: Batching in a whole engine: padding, positions and seeds of each request. In a stepping engine, several
    open sequences.
    """
    runs = polydraft_bench.evidence.runs
    count = min(run.prompt.max_new_tokens for run in runs)
    prompts = [list(run.prompt.token_ids) for run in runs]
    results = polydraft_bench.session.generate_many(prompts, **greedy_settings(count))
    for run, result in zip(runs, results, strict=True):
        polydraft_bench.same(
            run.speculative,
            result,
            wrong=f"generate_many gives another output than generate, prompt {run.prompt.place} (of the window).",
            length=count,
            names=("single", "among many"),
        )


def _known(bench: Bench, index: int = 1) -> tuple[GenerationResult, list[int], dict[str, Any]]:
    """A speculative result of the case's evidence, and the prompt and settings that must give it again."""
    result = bench.evidence.runs[index].speculative
    return result, list(result.prompt_token_ids), greedy_settings(len(result.token_ids))


def _expect_usable(bench: Bench) -> None:
    """The session still gives its earlier output."""
    result, prompt, settings = _known(bench)
    again = bench.session.generate(prompt, **settings)
    bench.same(result, again, wrong="Afterwards the session gives another output than before.", names=_AGAIN)


def _in_thread(work: Callable[[], None], errors: list[BaseException]) -> threading.Thread:
    """Start ``work`` in a thread; what it raises is put into ``errors``."""

    def run() -> None:
        try:
            work()
        except BaseException as error:  # a thread's error would else only be printed
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
