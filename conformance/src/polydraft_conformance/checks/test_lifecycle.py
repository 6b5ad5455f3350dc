"""Sessions: streams, cancelling, several at once, closing, loading again."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

from polydraft.errors import SessionBusyError, SessionClosedError

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.comparison import expect_same
from polydraft_conformance.evidence import evidence, greedy_settings
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft import Session

    from polydraft_conformance.evidence import Evidence
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

_AFTER = ("test_generates", "test_greedy_equals_plain")
_LONG = greedy_settings(400)
_PATIENCE = 20.0
"""Seconds that another thread is waited for."""


@check(scope="kind", after=(*_AFTER, "test_statistics_equal_counts"))
def test_stream_is_the_result_in_pieces(polydraft_session: Session, polydraft_evidence: Evidence) -> None:
    """Chunks joined are the result: tokens, text, accepted drafts; the last one says why it ended."""
    result = polydraft_evidence.generations[1].speculative
    prompt = list(result.prompt_token_ids)
    pieces = streamed(polydraft_session, prompt, **greedy_settings(len(result.token_ids)))
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
    told = [chunk.num_accepted_tokens for chunk in pieces.chunks]
    if None not in told and result.stats.num_accepted_tokens is not None:
        total = sum(count or 0 for count in told)
        expect(
            total == result.stats.num_accepted_tokens,
            f"Chunks tell {total} accepted drafts, the result {result.stats.num_accepted_tokens}.",
        )


@check(scope="kind", after=_AFTER)
def test_closing_a_stream_cancels(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_evidence: Evidence
) -> None:
    """Closing the iterator ends it at once, twice does no harm, and the session goes on as if nothing had been."""
    result = polydraft_evidence.generations[1].speculative
    prompt = list(result.prompt_token_ids)
    for chunks in (1, 3):
        stream = polydraft_session.stream(prompt, **_LONG)
        begun = [token for _ in range(chunks) for token in next(stream).token_ids]
        stream.close()
        stream.close()
        more = sum(len(chunk.token_ids) for chunk in stream)
        expect(more == 0, f"A closed stream gave {more} more tokens.")
        wanted = result.token_ids[: len(begun)]
        expect_same(
            polydraft_suite,
            polydraft_case,
            polydraft_session,
            prompt,
            wanted,
            begun[: len(wanted)],
            wrong="A stream that is closed early gave other tokens than the result.",
            names=("whole", "closed early"),
        )
    _expect_usable(polydraft_session, polydraft_evidence)


@check(scope="once", after=_AFTER)
def test_cancelling_from_another_thread(polydraft_session: Session, polydraft_evidence: Evidence) -> None:
    """A stream that another thread closes or cancels ends soon, and the session goes on."""
    prompt = list(polydraft_evidence.generations[1].prompt.token_ids)
    for name in ("stream.close()", "session.cancel()"):
        stream = polydraft_session.stream(prompt, **_LONG)
        first = next(stream)
        errors: list[BaseException] = []
        canceller = _in_thread(stream.close if name == "stream.close()" else polydraft_session.cancel, errors)
        count = len(first.token_ids) + sum(len(chunk.token_ids) for chunk in stream)
        canceller.join(_PATIENCE)
        expect(not canceller.is_alive(), f"{name} from another thread does not return.")
        expect(not errors, f"{name} from another thread raised {errors}.")
        expect(count < _LONG["max_new_tokens"], f"{name} from another thread did not cancel the stream.")
        result = stream.result
        expect(result is not None and result.finish_reason == "cancelled", f"After {name} the result is {result}.")
    _expect_usable(polydraft_session, polydraft_evidence)


@check(scope="once", after=_AFTER)
def test_interleaved_streams(polydraft_session: Session, polydraft_evidence: Evidence) -> None:
    """Two streams of one session, read in turn, give their own outputs; a serial session says that it is busy."""
    first, second = (polydraft_evidence.generations[index].speculative for index in (0, 1))
    settings = [greedy_settings(len(result.token_ids)) for result in (first, second)]
    one = polydraft_session.stream(list(first.prompt_token_ids), **settings[0])
    with closing(one):
        begun = list(next(one).token_ids)
        try:
            other = polydraft_session.stream(list(second.prompt_token_ids), **settings[1])
            found = list(next(other).token_ids)
        except SessionBusyError:
            expect(
                polydraft_session.running.concurrency == "serial",
                "The session says that its calls run concurrently, but refuses a second stream.",
            )
        else:
            going = [(one, begun), (other, found)]
            while going:
                for stream, tokens in list(going):
                    chunk = next(stream, None)
                    if chunk is None:
                        going.remove((stream, tokens))
                    else:
                        tokens.extend(chunk.token_ids)
            expect(tuple(begun) == first.token_ids, "The first of two interleaved streams gave another output.")
            expect(tuple(found) == second.token_ids, "The second of two interleaved streams gave another output.")
    _expect_usable(polydraft_session, polydraft_evidence)


@check(scope="once", after=_AFTER)
def test_several_threads(polydraft_session: Session, polydraft_evidence: Evidence) -> None:
    """Calls of several threads give what they give one after the other, concurrent or serial."""
    generations = polydraft_evidence.generations[:3]
    found: dict[int, tuple[int, ...]] = {}
    errors: list[BaseException] = []

    def work(index: int) -> Callable[[], None]:
        def call() -> None:
            prompt = generations[index].prompt
            settings = greedy_settings(prompt.max_new_tokens)
            found[index] = polydraft_session.generate(list(prompt.token_ids), **settings).token_ids

        return call

    threads = [_in_thread(work(index), errors) for index in range(len(generations))]
    for thread in threads:
        thread.join(_PATIENCE * 3)
    expect(not any(thread.is_alive() for thread in threads), "Calls of several threads block one another for ever.")
    expect(not errors, f"A call of several threads at once raised {errors}.")
    for index, generation in enumerate(generations):
        expect(found[index] == generation.speculative.token_ids, "A call among several threads gave another output.")


@check(scope="once", after=_AFTER)
def test_async_twins(polydraft_session: Session, polydraft_evidence: Evidence) -> None:
    """Agenerate and astream give what generate gives."""
    wanted = polydraft_evidence.generations[1].speculative
    prompt, settings = list(wanted.prompt_token_ids), greedy_settings(len(wanted.token_ids))

    async def both() -> tuple[tuple[int, ...], list[int]]:
        whole = await polydraft_session.agenerate(prompt, **settings)
        pieces = [token async for chunk in polydraft_session.astream(prompt, **settings) for token in chunk.token_ids]
        return whole.token_ids, pieces

    whole, pieces = asyncio.run(both())
    expect(whole == wanted.token_ids, "agenerate gives another output than generate.")
    expect(tuple(pieces) == wanted.token_ids, "astream gives another output than generate.")


@check(scope="once", after=_AFTER)
def test_two_sessions_at_once(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_evidence: Evidence
) -> None:
    """Two sessions with different drafters give their own outputs while both generate."""
    kinds = polydraft_case.pair.kinds
    other_case = polydraft_case.pair.case(1, kinds[-1])
    first = polydraft_evidence.generations[1].speculative
    settings = greedy_settings(len(first.token_ids))
    prompt = list(first.prompt_token_ids)
    with polydraft_suite.opened(other_case) as other, closing(polydraft_session.stream(prompt, **settings)) as one:
        begun = list(next(one).token_ids)
        second = other.generate(prompt, **settings)
        begun += [token for chunk in one for token in chunk.token_ids]
    expect(tuple(begun) == first.token_ids, "A second session changed the first one's output.")
    # Another k: near ties may turn.
    expect_same(
        polydraft_suite,
        polydraft_case,
        polydraft_session,
        prompt,
        first.token_ids,
        second.token_ids,
        wrong="The second session's output is another one.",
        names=("first session", "second session"),
    )
    _expect_usable(polydraft_session, polydraft_evidence)


@check(scope="once", after=_AFTER)
def test_close_and_load_again(polydraft_suite: Suite, polydraft_case: Case) -> None:
    """close() may be called twice, a closed session says so, its streams end, and the pair can be loaded again."""
    first = evidence(polydraft_suite, polydraft_case).generations[1].speculative
    prompt, settings = list(first.prompt_token_ids), greedy_settings(len(first.token_ids))
    session = polydraft_suite.load(polydraft_case)
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
    with polydraft_suite.opened(polydraft_case) as again:
        found = again.generate(prompt, **settings)
    expect(found.token_ids == first.token_ids, "The pair, loaded again, gives another output.")


@check(scope="once", after=_AFTER)
def test_many_prompts(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_evidence: Evidence
) -> None:
    """generate_many gives the results of single calls, in order."""
    prompts = [generation.prompt for generation in polydraft_evidence.generations]
    count = min(prompt.max_new_tokens for prompt in prompts)
    results = polydraft_session.generate_many([list(prompt.token_ids) for prompt in prompts], **greedy_settings(count))
    for generation, result in zip(polydraft_evidence.generations, results, strict=True):
        expect_same(
            polydraft_suite,
            polydraft_case,
            polydraft_session,
            generation.prompt.token_ids,
            generation.speculative.token_ids[:count],
            result.token_ids,
            wrong="generate_many gives another output than generate, "
            f"prompt {generation.prompt.place} (of the window).",
            names=("single", "among many"),
        )


def _expect_usable(session: Session, found: Evidence) -> None:
    """The session still gives its earlier output."""
    result = found.generations[1].speculative
    again = session.generate(list(result.prompt_token_ids), **greedy_settings(len(result.token_ids)))
    expect(again.token_ids == result.token_ids, "Afterwards the session gives another output than before.")


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
