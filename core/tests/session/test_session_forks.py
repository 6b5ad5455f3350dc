"""A session belongs to the process that loaded it, and so do its streams."""

import os
import signal
import threading
import warnings

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")

PROMPT = "<bos>Once upon a time"


def in_child(work):
    """The outcome of ``work`` in a forked child: the repr of its result, or the name of the exception."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
        child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            answer = repr(work())
        except BaseException as error:
            answer = type(error).__name__
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    answer = b""
    while data := os.read(read, 1000):
        answer += data
    os.close(read)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child was killed: it hung"
    return answer.decode()


@pytest.mark.parametrize("concurrency", ["serial", "concurrent"])
def test_a_stream_begun_before_the_fork(make_session, concurrency):
    session = make_session(concurrency)
    stream = session.stream(PROMPT, max_new_tokens=100, ignore_eos=True)
    begun = list(next(stream).token_ids)
    assert in_child(lambda: next(stream)) == "ForkedSessionError"
    assert in_child(stream.close) == "None"
    assert in_child(session.close) == "None"
    assert in_child(lambda: session.generate_many([PROMPT])) == "ForkedSessionError"
    begun += [token for chunk in stream for token in chunk.token_ids]
    assert len(begun) == 100, "the parent's stream continues"


def test_a_step_under_way_at_the_fork_does_not_hang_the_child(make_session, gate):
    session = make_session(gate=gate)
    gate.shut()
    stream = session.stream(PROMPT, max_new_tokens=100, ignore_eos=True)
    thread = threading.Thread(target=lambda: [None for _ in stream], daemon=True)
    thread.start()
    assert gate.waiting.wait(10)
    assert in_child(lambda: next(stream)) == "ForkedSessionError"
    assert in_child(stream.close) == "None"
    gate.open.set()
    thread.join(20)
    assert stream.result.finish_reason == "length"


def test_what_cannot_be_cancelled_says_so(make_session):
    session = make_session()
    stream = session.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    next(stream)
    assert in_child(stream.cancel) == "ForkedSessionError"
    assert in_child(session.cancel) == "ForkedSessionError"
    assert sum(len(chunk.token_ids) for chunk in stream) == 19, "the parent's stream continues"
