"""One call at a time: waiting, cancelling while waiting, closing while others wait, threads and tasks."""

import asyncio
import contextlib
import gc
import threading
import time

import pytest
from polydraft._session.call_lock import CallLock
from polydraft.errors import SessionBusyError, SessionClosedError

PROMPT = "<bos>Once upon a time"
LONG = {"max_new_tokens": 300, "ignore_eos": True}
SHORT = {"max_new_tokens": 12, "ignore_eos": True}


def in_thread(work):
    """Run ``work`` in a thread; ``join`` gives its result, or raises what it raised."""
    box = {}

    def run():
        try:
            box["result"] = work()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join(patience=20):
        thread.join(patience)
        assert not thread.is_alive(), "the thread does not end"
        if "error" in box:
            raise box["error"]
        return box["result"]

    return join


# The lock alone


def test_a_serial_slot():
    slot = CallLock(serial=True)
    assert slot.try_acquire("call 1", "a")
    assert slot.held_by("a")
    assert slot.try_acquire("call 1", "a"), "it is held for this call"
    assert not slot.try_acquire("call 2", "b")
    with pytest.raises(SessionBusyError):
        slot.acquire("call 2", "a", lambda: False)
    assert not slot.acquire("call 2", "b", lambda: True), "given up"
    slot.release("call 2")
    assert slot.held_by("a"), "another call does not release it"
    slot.release("call 1")
    slot.release("call 1")
    assert not slot.held_by("a")
    assert slot.acquire("call 2", "b", lambda: False)


def test_a_concurrent_slot_never_blocks():
    slot = CallLock(serial=False)
    assert slot.acquire("call 1", "a", lambda: False)
    assert slot.acquire("call 2", "a", lambda: False)
    assert not slot.held_by("a")
    slot.release("call 1")


# Threads


def test_calls_of_two_threads_wait_for_each_other(make_session, gate):
    session = make_session(gate=gate)
    expected = session.generate(PROMPT, **SHORT).token_ids
    gate.shut()
    first = in_thread(lambda: session.generate(PROMPT, **SHORT))
    assert gate.waiting.wait(10)
    second = in_thread(lambda: session.generate(PROMPT, **SHORT))
    time.sleep(0.05)
    gate.open.set()
    assert first().token_ids == second().token_ids == expected


def test_a_thread_that_holds_the_slot_is_told_so(make_session):
    session = make_session()
    with session.stream(PROMPT, **LONG) as stream:
        next(stream)
        with pytest.raises(SessionBusyError, match="this thread"):
            session.generate(PROMPT, **SHORT)
        assert next(stream).token_ids, "the first stream continues"
    assert session.generate(PROMPT, **SHORT).token_ids


@pytest.mark.parametrize("how", ["session.cancel", "stream.close"])
def test_a_call_that_waits_can_be_cancelled(make_session, how):
    session = make_session()
    holder = session.stream(PROMPT, **LONG)
    next(holder)
    waiting = session.stream(PROMPT, **LONG)
    join = in_thread(lambda: list(waiting))
    time.sleep(0.05)
    if how == "stream.close":
        waiting.close()
    else:
        waiting.cancel()
    chunks = join()
    assert [chunk.token_ids for chunk in chunks] in ([], [()])
    assert waiting.result.finish_reason == "cancelled"
    assert waiting.result.token_ids == ()
    assert next(holder).token_ids, "the one that holds the slot continues"
    holder.close()


def test_closing_while_calls_wait(make_session):
    """The holder and the waiter end, whichever is closed first: no deadlock."""
    for _ in range(5):
        session = make_session()
        holder = session.stream(PROMPT, **LONG)
        next(holder)
        joins = [in_thread(lambda session=session: session.generate(PROMPT, **LONG)) for _ in range(3)]
        time.sleep(0.03)
        closing = in_thread(session.close)
        closing()
        for join in joins:
            with contextlib.suppress(SessionClosedError):
                assert join().finish_reason == "cancelled"
        assert holder.result.finish_reason == "cancelled"


def test_cancelling_while_the_engine_works(make_session, gate):
    session = make_session(gate=gate)
    gate.shut()
    join = in_thread(lambda: session.generate(PROMPT, **LONG))
    assert gate.waiting.wait(10)
    session.cancel()
    gate.open.set()
    result = join()
    assert result.finish_reason == "cancelled"
    assert len(result.token_ids) < 20
    assert session.generate(PROMPT, **SHORT).finish_reason == "length", "the session stays usable"


def test_closing_while_the_engine_works(make_session, gate):
    session = make_session(gate=gate)
    gate.shut()
    join = in_thread(lambda: session.generate(PROMPT, **LONG))
    assert gate.waiting.wait(10)
    closing = in_thread(session.close)
    time.sleep(0.05)
    gate.open.set()
    closing()
    assert join().finish_reason == "cancelled"


def test_cancel_and_close_while_streams_come_and_go(make_session):
    session = make_session("concurrent")
    going = threading.Event()
    going.set()

    def work():
        while going.is_set():
            with session.stream(PROMPT, **SHORT) as stream:
                next(stream, None)

    joins = [in_thread(work) for _ in range(3)]
    for _ in range(200):
        session.cancel()
    going.clear()
    for join in joins:
        join()


# Tasks


def test_tasks_wait_for_each_other(make_session):
    session = make_session()
    expected = session.generate(PROMPT, **SHORT).token_ids

    async def work():
        return await asyncio.gather(*(session.agenerate(PROMPT, **SHORT) for _ in range(4)))

    assert [result.token_ids for result in asyncio.run(work())] == [expected] * 4


def test_a_task_that_holds_the_slot_is_told_so(make_session):
    session = make_session()

    async def work():
        stream = session.astream(PROMPT, **LONG)
        await anext(stream)
        with pytest.raises(SessionBusyError, match="this task"):
            await session.agenerate(PROMPT, **SHORT)
        assert (await anext(stream)).token_ids, "the first stream continues"
        await stream.aclose()
        return await session.agenerate(PROMPT, **SHORT)

    assert asyncio.run(asyncio.wait_for(work(), 20)).finish_reason == "length"


def test_a_stream_left_by_break_is_not_in_the_way(make_session):
    session = make_session()

    async def work():
        for _ in range(3):
            async for chunk in session.astream(PROMPT, **LONG):
                assert chunk.token_ids
                break
            assert (await session.agenerate(PROMPT, **SHORT)).finish_reason == "length"

    asyncio.run(asyncio.wait_for(work(), 20))


@pytest.mark.parametrize("again", [False, True])
def test_cancelled_tasks_give_the_slot_back(make_session, gate, again):
    session = make_session(gate=gate)

    async def work():
        gate.shut()
        task = asyncio.create_task(session.agenerate(PROMPT, **LONG))
        await asyncio.to_thread(gate.waiting.wait, 10)
        task.cancel()
        if again:  # while the first cancellation waits for the engine
            await asyncio.sleep(0.05)
            task.cancel()
        waiting = asyncio.create_task(session.agenerate(PROMPT, **SHORT))
        await asyncio.sleep(0.05)
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await waiting

    assert asyncio.run(asyncio.wait_for(work(), 20)).finish_reason == "length"


def test_a_task_cancelled_while_it_waits(make_session, gate):
    session = make_session(gate=gate)

    async def work():
        gate.shut()
        first = asyncio.create_task(session.agenerate(PROMPT, **SHORT))
        await asyncio.to_thread(gate.waiting.wait, 10)
        second = asyncio.create_task(session.agenerate(PROMPT, **SHORT))
        await asyncio.sleep(0.05)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open.set()
        return await first

    assert asyncio.run(asyncio.wait_for(work(), 20)).finish_reason == "length"
    assert session.generate(PROMPT, **SHORT).finish_reason == "length"


def test_session_cancel_reaches_tasks_that_wait(make_session, gate):
    session = make_session(gate=gate)

    async def work():
        gate.shut()
        tasks = [asyncio.create_task(session.agenerate(PROMPT, **LONG)) for _ in range(2)]
        await asyncio.to_thread(gate.waiting.wait, 10)
        await asyncio.sleep(0.05)
        session.cancel()
        gate.open.set()
        return await asyncio.gather(*tasks)

    results = asyncio.run(asyncio.wait_for(work(), 20))
    assert [result.finish_reason for result in results] == ["cancelled"] * 2


def test_the_event_loop_goes_on_while_the_engine_works(make_session, gate):
    session = make_session(gate=gate)

    async def work():
        gate.shut()
        task = asyncio.create_task(session.agenerate(PROMPT, **SHORT))
        turns = 0
        while not gate.waiting.is_set():
            await asyncio.sleep(0.005)
        for _ in range(20):
            turns += 1
            await asyncio.sleep(0)
        gate.open.set()
        await task
        return turns

    assert asyncio.run(asyncio.wait_for(work(), 20)) == 20


def test_errors_of_a_call_reach_the_task(make_session):
    session = make_session()

    async def work():
        with pytest.raises(ValueError, match="max_new_tokens"):
            await session.agenerate(PROMPT, max_new_tokens=0)
        with pytest.raises(ValueError, match="max_new_tokens"):
            await anext(session.astream(PROMPT, max_new_tokens=0))

    asyncio.run(work())


def test_a_forgotten_stream_gives_the_slot_back(make_session):
    session = make_session()
    stream = session.stream(PROMPT, **LONG)
    next(stream)
    del stream
    gc.collect()
    assert session.generate(PROMPT, **SHORT).finish_reason == "length"
