"""A session called from inside its own step, by a logits processor or a signal handler: nothing waits for itself."""

import asyncio
import contextlib
import os
import signal
import threading

import pytest
from polydraft.errors import SessionBusyError, SessionClosedError

PROMPT = "<bos>Once upon a time"
LONG = {"max_new_tokens": 40, "ignore_eos": True}
AT = 5  # tokens of the output, drafts included


@pytest.fixture(params=["serial", "concurrent"])
def session(make_session, request):
    return make_session(request.param)


def in_thread(work):
    """The result of ``work`` in a thread, which must end."""
    box = []
    thread = threading.Thread(target=lambda: box.append(work()), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    return box[0]


def once(prompt_length, act):
    """A processor that calls something once, after ``AT`` tokens, and the outcome of that call."""
    came = []

    def processor(prefix_ids, logits):
        if len(prefix_ids) >= prompt_length + AT and not came:
            came.append(None)
            try:
                came[0] = act()
            except Exception as error:
                came[0] = error
        return logits

    return processor, came


def prompt_length(session):
    return len(session.generate(PROMPT, max_new_tokens=1).prompt_token_ids)


@pytest.mark.parametrize("how", ["generate", "stream", "generate_many", "agenerate", "next of another"])
@pytest.mark.parametrize("outer", ["generate", "agenerate"])
def test_a_call_is_refused(session, how, outer):
    other = session.stream(PROMPT, **LONG)
    act = {
        "generate": lambda: session.generate(PROMPT, **LONG),
        "stream": lambda: session.stream(PROMPT, **LONG),
        "generate_many": lambda: session.generate_many([PROMPT], **LONG),
        "agenerate": lambda: asyncio.run(session.agenerate(PROMPT, **LONG)),
        "next of another": lambda: next(other),
    }[how]
    processor, came = once(prompt_length(session), act)
    given = {**LONG, "logits_processor": processor}
    if outer == "generate":
        result = in_thread(lambda: session.generate(PROMPT, **given))
    else:
        result = in_thread(lambda: asyncio.run(session.agenerate(PROMPT, **given)))
    assert isinstance(came[0], SessionBusyError)
    assert came[0].hint
    assert len(result.token_ids) == 40, "the call under way continues"


@pytest.mark.parametrize("outer", ["generate", "agenerate", "stream"])
def test_closing_the_session(session, outer):
    closes = []
    engine = session.engine
    close = engine.close
    engine.close = lambda: (closes.append(len(streams_running(session))), close())
    processor, came = once(prompt_length(session), lambda: (session.close(), len(closes))[1])
    given = {**LONG, "logits_processor": processor}

    def by_stream():
        stream = session.stream(PROMPT, **given)
        chunks = list(stream)
        assert chunks[-1].finish_reason == "cancelled"
        assert "".join(chunk.text for chunk in chunks) == stream.result.text
        return stream.result

    calls = {
        "generate": lambda: session.generate(PROMPT, **given),
        "agenerate": lambda: asyncio.run(session.agenerate(PROMPT, **given)),
        "stream": by_stream,
    }
    result = in_thread(calls[outer])
    assert came == [0], "the engine was not closed under the step"
    assert closes == [0], "it was closed once, when the step was over"
    assert result.finish_reason == "cancelled"
    assert 1 <= len(result.token_ids) < 20
    with pytest.raises(SessionClosedError):
        session.generate(PROMPT)


def streams_running(session):
    return [stream for stream in session._open_streams() if stream._state == "running"]


def test_closing_a_stream(session):
    streams = []

    def act():
        streams[0].close()

    processor, _ = once(prompt_length(session), act)
    streams.append(session.stream(PROMPT, **LONG, logits_processor=processor))
    chunks = in_thread(lambda: list(streams[0]))
    assert chunks[-1].finish_reason == "cancelled"
    assert session.generate(PROMPT, max_new_tokens=4, ignore_eos=True).finish_reason == "length"


def test_closing_the_session_while_another_thread_steps(make_session, gate):
    """The closing thread is inside a step; the other thread's stream ends by itself, and the engine after both."""
    session = make_session("concurrent", gate=gate)
    length = prompt_length(session)
    gate.shut()
    results = []
    thread = threading.Thread(target=lambda: results.append(session.generate(PROMPT, **LONG)), daemon=True)
    thread.start()
    assert gate.waiting.wait(10)

    def act():
        session.close()
        gate.open.set()

    processor, _ = once(length - AT, act)  # at the prefill, which does not pass the gate
    result = in_thread(lambda: session.generate(PROMPT, **LONG, logits_processor=processor))
    thread.join(20)
    assert not thread.is_alive()
    assert [result.finish_reason, results[0].finish_reason] == ["cancelled", "cancelled"]
    assert not session._in_progress
    assert not session._engine_to_close


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this platform has no SIGUSR1")
def test_a_signal_handler_closes_the_session(session):
    """The handler runs in the main thread, in the middle of its step."""
    processor, _ = once(prompt_length(session), lambda: os.kill(os.getpid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: session.close())
    hung = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    try:
        result = session.generate(PROMPT, **LONG, logits_processor=processor)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, hung)
        signal.signal(signal.SIGUSR1, before)
    assert result.finish_reason == "cancelled"
    with pytest.raises(SessionClosedError):
        session.generate(PROMPT)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no interval timers")
def test_a_signal_handler_closes_at_any_moment(make_session):
    """Wherever the main thread is, in a step, closing or in between, session and stream end."""
    before = signal.getsignal(signal.SIGALRM)
    try:
        for tenths in range(1, 40):
            session = make_session()
            signal.signal(signal.SIGALRM, lambda *_, session=session: session.close())
            signal.setitimer(signal.ITIMER_REAL, tenths / 10_000)
            with contextlib.suppress(SessionClosedError):
                while True:
                    with session.stream(PROMPT, max_new_tokens=3, ignore_eos=True) as stream:
                        next(stream, None)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not session._in_progress
            assert not session._engine_to_close
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
