"""Cancelling one call: from another thread or task, before it starts, while it waits, after it has ended."""

import asyncio
import contextlib
import gc
import threading

import pytest
from polydraft._session.session import Session
from polydraft.contract import EngineSequence
from polydraft.errors import SessionBusyError
from scripted_engines import CAPABILITIES, Stepping, Whole, emit

PROMPT = "abc"
LONG = {"max_new_tokens": 40}


class Held:
    """Rounds that wait, after the second, until ``go`` is set."""

    def __init__(self):
        self.go, self.waits = threading.Event(), threading.Event()

    def __call__(self, generation):
        while generation.finish_reason is None and not generation.cancelled():
            if len(generation.token_ids) == 2 and not self.go.is_set():
                self.waits.set()
                assert self.go.wait(10)
            yield emit(generation)


@pytest.fixture(params=["serial", "concurrent"])
def session(request):
    engine = Whole(concurrency=request.param)
    with Session(engine, engine.running, CAPABILITIES) as made:
        yield made


def works(session):
    return session.generate(PROMPT, max_new_tokens=3).finish_reason == "length"


def in_time(work):
    return asyncio.run(asyncio.wait_for(work, 20))


@pytest.mark.parametrize("how", ["task", "thread"])
def test_one_of_two_streams_is_cancelled(session, how):
    async def work():
        async def read(stream):
            return [chunk async for chunk in stream]

        session.engine.fault = held = Held()
        first = session.astream(PROMPT, **LONG)
        reading = asyncio.create_task(read(first))
        await asyncio.to_thread(held.waits.wait, 10)
        second = session.astream(PROMPT, **LONG)
        other = asyncio.create_task(read(second))
        if how == "task":
            first.cancel()
        else:
            await asyncio.to_thread(first.cancel)
        held.go.set()
        return first, await reading, second, await other

    first, chunks, second, others = in_time(work())
    assert first.cancelled
    assert first.result.finish_reason == chunks[-1].finish_reason == "cancelled"
    assert first.result.text == "".join(chunk.text for chunk in chunks)
    assert 2 <= len(first.result.token_ids) <= 3
    assert not second.cancelled
    assert second.result.finish_reason == others[-1].finish_reason == "length"
    session.engine.fault = None
    assert works(session)


def test_a_stream_is_cancelled_from_another_thread(session):
    session.engine.fault = held = Held()
    stream = session.stream(PROMPT, **LONG)
    threads = [threading.Thread(target=list, args=(stream,))]
    threads[0].start()
    assert held.waits.wait(10)
    stream.cancel()
    stream.cancel()
    held.go.set()
    threads[0].join(10)
    assert stream.result.finish_reason == "cancelled"
    session.engine.fault = None
    assert works(session)


def test_before_the_start_nothing_is_generated(session):
    async def work():
        stream = session.astream(PROMPT, **LONG)
        stream.cancel()
        return [chunk async for chunk in stream], stream.result

    chunks, result = in_time(work())
    assert [chunk.token_ids for chunk in chunks] == [()]
    assert (result.finish_reason, result.token_ids) == ("cancelled", ())
    stream = session.stream(PROMPT, **LONG)
    stream.cancel()
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert works(session)


def test_after_the_end_nothing_changes(session):
    async def work():
        async with session.astream(PROMPT, max_new_tokens=3) as stream:
            async for _ in stream:
                pass
        stream.cancel()
        await stream.aclose()
        assert [chunk async for chunk in stream] == []
        return stream.result

    assert in_time(work()).finish_reason == "length"
    assert works(session)


def test_a_waiting_stream_is_cancelled():
    engine = Whole()
    with Session(engine, engine.running, CAPABILITIES) as session:

        async def work():
            async with session.astream(PROMPT, **LONG) as holder:
                await anext(holder)
                waiting = session.astream(PROMPT, **LONG)
                reading = asyncio.create_task(anext(waiting))
                await asyncio.sleep(0.05)
                waiting.cancel()
                chunk = await reading
                assert (await anext(holder)).token_ids, "the other one continues"
                return chunk.finish_reason

        assert in_time(work()) == "cancelled"
        assert works(session)


@pytest.mark.parametrize("how", ["aclose", "cancel the task", "cancel the task twice", "leave the block", "drop"])
def test_other_ends_stop_the_engine(session, how):
    async def work():
        session.engine.fault = held = Held()
        stream = session.astream(PROMPT, **LONG)
        if how == "leave the block":
            held.go.set()
            async with stream:
                assert (await anext(stream)).token_ids
            return stream.result.finish_reason
        if how == "drop":
            held.go.set()
            await anext(stream)
            del stream
            gc.collect()
            return "cancelled"

        async def read():
            async for _ in stream:
                pass

        reading = asyncio.create_task(read())
        await asyncio.to_thread(held.waits.wait, 10)
        threading.Timer(0.1, held.go.set).start()
        if how == "aclose":
            await stream.aclose()
            await reading
        else:
            reading.cancel()
            if how == "cancel the task twice":
                await asyncio.sleep(0.02)
                reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            assert reading.cancelled()
        return stream.result.finish_reason

    assert in_time(work()) == "cancelled"
    assert not session._in_progress
    session.engine.fault = None
    assert works(session)


def test_a_stream_has_one_reader_at_a_time(session):
    async def work():
        session.engine.fault = held = Held()
        stream = session.astream(PROMPT, **LONG)
        for _ in range(2):
            await anext(stream)
        reading = asyncio.create_task(anext(stream))
        await asyncio.to_thread(held.waits.wait, 10)
        with pytest.raises(SessionBusyError, match="Another task"):
            await anext(stream)
        held.go.set()
        assert (await reading).token_ids
        await stream.aclose()

    in_time(work())
    session.engine.fault = None
    assert works(session)


def test_cancelling_during_the_prefill():
    started, go = threading.Event(), threading.Event()

    class Slow(EngineSequence):
        length = 0
        verify = rollback = None

        def prefill(self, token_ids, sampler, *, keep_logits=False):
            started.set()
            assert go.wait(10)
            self.check_cancelled()

        def close(self):
            closed.append(self)

    Slow.__abstractmethods__ = frozenset()
    closed = []
    engine = Stepping()
    engine.open_sequence = Slow
    with Session(engine, engine.running, CAPABILITIES) as session:
        stream = session.stream(PROMPT, **LONG)
        thread = threading.Thread(target=list, args=(stream,))
        thread.start()
        assert started.wait(10)
        stream.cancel()
        go.set()
        thread.join(10)
        assert stream.result.finish_reason == "cancelled"
        assert len(closed) == 1
        del engine.open_sequence
        assert works(session)


def test_an_event_loop_that_ends_in_the_middle(session):
    """A stream that nobody closes, and whose loop is gone, gives the slot back when it is collected."""

    async def work():
        stream = session.astream(PROMPT, **LONG)
        await anext(stream)
        return stream

    stream = in_time(work())
    del stream
    gc.collect()
    assert works(session)
    loop = asyncio.new_event_loop()
    session.engine.fault = held = Held()
    stream = session.astream(PROMPT, **LONG)
    task = loop.create_task(anext(stream))
    loop.run_until_complete(asyncio.sleep(0.05))
    held.go.set()
    loop.close()
    task._log_destroy_pending = False
    del task, stream
    gc.collect()
    session.engine.fault = None
    assert works(session)
