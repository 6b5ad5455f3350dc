"""The client of engines' servers against hostile ones: each costs a typed error, in a known time."""

import contextlib
import dataclasses
import gzip
import itertools
import json
import re
import socket
import threading
import time
import traceback

import pytest
from polydraft.engine_parts.http_client import HttpClient, HttpLimits, MalformedAnswerError, NotConnectedError
from polydraft.errors import BackendUnavailableError, EngineError
from polydraft.secrets import Secret

KEY = "canary-8f31"
# A machine that is busy holds up a good answer, too: only a test of a time limit runs with HASTY ones.
LIMITS = HttpLimits(
    connect_timeout=30, answer_timeout=60, read_timeout=60, token_timeout=1, answer_bytes=300_000, event_bytes=5000
)
HASTY = dataclasses.replace(LIMITS, answer_timeout=0.3, read_timeout=0.3, token_timeout=0.1)
# Three events may take 2.3 seconds, and each of them 2.
SLOW = dataclasses.replace(LIMITS, read_timeout=2, token_timeout=0.1)
OK = b"HTTP/1.1 200 OK\r\n"
JSON = OK + b"Content-Type: application/json\r\n"
SSE = OK + b"Content-Type: text/event-stream\r\n\r\n"
EVENT = b'data: {"tokens": [1]}\n\n'


@contextlib.contextmanager
def hostile(*pieces, pause=0.0):
    """A server that answers each request with these bytes, one after the other; gives its url and the requests."""
    seen, stop = [], threading.Event()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            seen.append(whole_request(connection))
            for piece in pieces[0]() if callable(pieces[0]) else pieces:
                if stop.is_set():
                    return
                connection.sendall(piece)
                time.sleep(pause)

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
        finally:
            stop.set()
            server.shutdown(socket.SHUT_RDWR)


def whole_request(connection):
    """A connection that is closed with bytes unread is reset, and what was sent last is lost."""
    text = connection.recv(65536)
    length = re.search(rb"(?i)content-length: (\d+)", text)
    missing = int(length[1]) - len(text.partition(b"\r\n\r\n")[2]) if length else 0
    return text + connection.recv(missing, socket.MSG_WAITALL) if missing > 0 else text


def client(url, limits=LIMITS):
    return HttpClient(url, name="The server", key=Secret(KEY), key_variable="THE_KEY", limits=limits, own=True)


def limits_for(pause, says):
    """A server that pauses is one that takes too long: it gets little time."""
    if not pause:
        return LIMITS
    return SLOW if "in time" in says else HASTY


def endless(start, piece):
    return lambda: itertools.chain([start], itertools.repeat(piece))


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED = JSON + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "drips the status line": ((lambda: (bytes([one]) for one in itertools.cycle(OK[:-2])),), 0.05, "within 0.3 s"),
    "drips headers": ((endless(OK, b"X"),), 0.05, "within 0.3 s"),
    "drips the body": ((endless(JSON + b"\r\n", b" "),), 0.05, "within 0.3 s"),
    "drips chunks": ((endless(CHUNKED, chunk(b" ")),), 0.05, "within 0.3 s"),
    "says nothing": ((endless(b"", b""),), 0.05, "within 0.3 s"),
    "endless headers": ((endless(OK, b"X-Y: z\r\n"),), 0, "100 headers"),
    "an endless header": ((endless(OK + b"X: ", b"y" * 1000),), 0, "broke"),
    "endless 1xx": ((endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 99),), 0, "more than 300000 bytes"),
    "an endless body": ((endless(JSON + b"\r\n", b" " * 1000),), 0, "more than 300000 bytes"),
    "endless chunks": ((endless(CHUNKED, chunk(b" " * 999)),), 0, "more than 300000 bytes"),
    "a huge chunk": ((endless(CHUNKED + b"fffffffffff\r\n", b" " * 999),), 0, "more than 300000 bytes"),
    "endless trailers": ((endless(CHUNKED + b"0\r\n", b"X: y\r\n" * 99),), 0, "more than 300000 bytes"),
    "claims to be huge": ((endless(JSON + b"Content-Length: 9999999999999\r\n\r\n", b" " * 999),), 0, "300000 bytes"),
    "a gzip bomb": ((JSON + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b" " * 10**6)), 0, "compressed"),
    "ends too early": ((JSON + b"Content-Length: 20\r\n\r\n[1",), 0, "broke"),
    "claims to be shorter": ((JSON + b"Content-Length: 2\r\n\r\n[1, 2]",), 0, "not JSON"),
    "a wrong chunk": ((CHUNKED + b"zz\r\n[]\r\n",), 0, "broke"),
    "hangs up": ((b"",), 0, "broke"),
    "no HTTP": ((b"SSH-2.0-OpenSSH\r\n",), 0, "broke"),
    "invalid UTF-8": ((JSON + b'\r\n"\xff"',), 0, "not UTF-8"),
    "UTF-16": ((JSON + b"\r\n" + "[1]".encode("utf-16"),), 0, "not UTF-8"),
    "nested": ((JSON + b"\r\n" + b"[" * 200_000,), 0, "nested too deeply"),
    "not a number": ((JSON + b"\r\n[NaN]",), 0, "NaN is not a number"),
    "a huge number": ((JSON + b"\r\n" + b"9" * 5000,), 0, "not JSON"),
    "HTML": ((OK + b"Content-Type: text/html\r\n\r\n<html>",), 0, "its type is text/html"),
    "204": ((b"HTTP/1.1 204 No Content\r\n\r\n",), 0, "failed (204)"),
    "500": ((b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 200_000,), 0, "failed (500): " + "x" * 300 + "..."),
    "500 without end": ((endless(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 999),), 0, "failed (500): xxx"),
    "503 that drips": ((endless(b"HTTP/1.1 503 No\r\n\r\n", b"x"),), 0.05, "failed (503): x"),
    "control characters": (
        (b"HTTP/1.1 500 No\r\n\r\n\x1b]52;c;eA==\x07\x9b2J\xe2\x80\xae",),
        0,
        "\\x1b]52;c;eA==\\x07",
    ),
    "an error of another shape": ((b'HTTP/1.1 500 No\r\n\r\n{"error": [[]]}',), 0, "failed (500): [[]]"),
}


@pytest.mark.parametrize(("pieces", "pause", "says"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer(pieces, pause, says):
    started = time.monotonic()
    with hostile(*pieces, pause=pause) as (url, _), pytest.raises(EngineError) as caught:
        client(url, limits_for(pause, says)).json("/props")
    assert says in str(caught.value)
    assert str(caught.value).startswith(("The server at http://127.0.0.1", "The connection to The server at"))
    assert time.monotonic() - started < 30


STREAMS = {
    "only keeps alive": ((endless(SSE, b": ping\n\n"),), 0.05, "sent no event for 0.3 seconds"),
    "drips an event": ((endless(SSE + b"data: ", b" "),), 0.05, "sent no event for 0.3 seconds"),
    "stops talking": ((lambda: itertools.chain([SSE, EVENT], itertools.repeat(b"")),), 0.05, "no event for 0.3 s"),
    "slow events": ((endless(SSE, EVENT),), 0.8, "did not end its answer in time"),
    "endless events": ((endless(SSE, EVENT * 50),), 0, "sent more than"),
    "endless comments": ((endless(SSE, b": ping\n" * 50),), 0, "sent more than"),
    "an endless line": ((endless(SSE + b"data: ", b"x" * 500),), 0, "a line is longer than 5256 bytes"),
    "an endless event": ((endless(SSE, b"data: 1\n" * 50),), 0, "an event is longer than 5256 bytes"),
    "no JSON": ((SSE + b"data: {nonsense\n\n",), 0, "not JSON"),
    "no object": ((SSE + b"data: [1]\n\n",), 0, "not a JSON object"),
    "no UTF-8": ((SSE + b'data: {"a": "\xff"}\n\n',), 0, "not UTF-8"),
    "an error": ((SSE + b'data: {"error": {"message": "it died", "code": 503}}\n\n',), 0, "failed (503): it died"),
    "an error of llama-server": ((SSE + b'error: {"message": "it died"}\n\n',), 0, "failed (500): it died"),
    "a broken chunk": (
        (OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(EVENT) + b"5\r\nda",),
        0,
        "broke",
    ),
    "JSON": ((JSON + b"\r\n{}",), 0, "its type is application/json"),
    "compressed": ((OK + b"Content-Encoding: br\r\n\r\n",), 0, "compressed (br)"),
}


@pytest.mark.parametrize(("pieces", "pause", "says"), STREAMS.values(), ids=STREAMS)
def test_a_stream(pieces, pause, says):
    started = time.monotonic()
    with hostile(*pieces, pause=pause) as (url, _), pytest.raises(EngineError) as caught:
        list(client(url, limits_for(pause, says)).stream("/completion", {}, num_tokens=3, num_prompt_tokens=1))
    assert says in str(caught.value)
    assert time.monotonic() - started < 30


def test_a_good_stream():
    body = b'data: {"a": 1}\r\n\r\n: comment\r\nevent: x\r\ndata: {"b":\r\ndata:  "\xc3\xa4"}\r\n\r\n'
    body += b"data: [DONE]\r\n\r\nrest"
    for pieces in ((SSE + body,), (SSE, *(bytes([one]) for one in body))):
        with hostile(*pieces) as (url, _):
            events = client(url).stream("/completion", {}, num_tokens=3, num_prompt_tokens=1)
            assert list(events) == [{"a": 1}, {"b": "ä"}]


def test_a_slow_reader_is_no_slow_server():
    with hostile(SSE + EVENT * 3 + b"data: [DONE]\n\n") as (url, _):
        read = []
        for event in client(url, SLOW).stream("/completion", {}, num_tokens=3, num_prompt_tokens=1):
            time.sleep(0.8)  # more than the server may take in all
            read.append(event)
    assert len(read) == 3


def test_cancelled_while_the_server_is_silent():
    cancelled = threading.Event()
    limits = HttpLimits(read_timeout=60)
    with hostile(endless(SSE + EVENT, b""), pause=0.01) as (url, _):
        events = HttpClient(url, name="The server", limits=limits, own=True).stream(
            "/completion", {}, num_tokens=9, num_prompt_tokens=1, cancelled=cancelled.is_set
        )
        assert next(events) == {"tokens": [1]}
        threading.Timer(0.2, cancelled.set).start()
        started = time.monotonic()
        assert list(events) == []
        assert time.monotonic() - started < 20


def test_after_the_last_token_the_end_has_to_come_soon():
    with hostile(endless(SSE + EVENT, b"data: {}\n\n"), pause=0.1) as (url, _):
        limits = HttpLimits(answer_timeout=0.5, read_timeout=60)
        events = HttpClient(url, name="The server", limits=limits, own=True).stream(
            "/completion", {}, num_tokens=9, num_prompt_tokens=1
        )
        next(events)
        events.finishing()
        with pytest.raises(EngineError, match="did not end its answer in time"):
            list(events)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_server_that_repeats_the_key(status):
    said = json.dumps({"error": {"message": f"wrong: Bearer {KEY}\x1b[31m"}}).encode()
    with hostile(b"HTTP/1.1 %d No\r\n\r\n" % status + said) as (url, seen):
        with pytest.raises((EngineError, BackendUnavailableError)) as caught:
            client(url).json("/props")
        assert f"Authorization: Bearer {KEY}".encode() in seen[0]
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown + repr(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_status_line_that_repeats_the_key():
    with hostile(f"HTTP/9.9 {KEY} {KEY}\r\n\r\n".encode()) as (url, _), pytest.raises(EngineError) as caught:
        client(url).json("/props")
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_redirect_takes_the_key_nowhere():
    with hostile(JSON + b"\r\n{}") as (other, asked):
        moved = f"HTTP/1.1 302 Found\r\nLocation: {other}/props\r\n\r\n".encode()
        with hostile(moved) as (url, _), pytest.raises(BackendUnavailableError, match="redirects"):
            client(url).json("/props")
        assert asked == []


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(NotConnectedError, match="No connection to The server at"):
        client(f"http://127.0.0.1:{port}").get("/")


@pytest.mark.parametrize("found", [None, {}, [True], [1.0], ["1"], [-1], [8], [[1]], [10**30]], ids=str)
def test_token_ids(found):
    connected = client("http://127.0.0.1:1")
    assert connected.token_ids([0, 7], 8) == (0, 7)
    with pytest.raises(MalformedAnswerError):
        connected.token_ids(found, 8)


def test_a_proxy_gets_its_login_and_does_not_show_it(monkeypatch):
    with hostile(JSON + b"\r\n[1]") as (proxy, asked):
        monkeypatch.setenv("http_proxy", proxy.replace("://", "://user:canary-pw@"))
        monkeypatch.setenv("no_proxy", "")
        other = HttpClient("http://server.invalid:81/x", name="The server", limits=LIMITS)
        assert other.json("/props") == [1]
        assert asked[0].startswith(b"GET http://server.invalid:81/x/props HTTP/1.1\r\n")
        assert b"Proxy-Authorization: Basic dXNlcjpjYW5hcnktcHc=" in asked[0]
        monkeypatch.setenv("https_proxy", proxy.replace("://", "://user:canary-pw@"))
        with pytest.raises(EngineError) as caught:
            HttpClient("https://server.invalid", name="The server", limits=LIMITS).get("/")
    assert "canary" not in "".join(traceback.format_exception(caught.value))


LINES = OK + b"Content-Type: application/x-ndjson\r\n\r\n"


def lines_of(url):
    client = HttpClient(url, name="The server", limits=LIMITS)
    return client.stream("/", {}, num_tokens=1, num_prompt_tokens=0, lines=True)


def test_lines_of_json():
    """Empty lines, both ends of lines, and a last line without one; an empty ``error`` is none."""
    with hostile(LINES + b'{"a": 1}\r\n\n{"a"', b': 2, "error": ""}\n{"a": 3}') as (url, _):
        assert [event["a"] for event in lines_of(url)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"{nothing}\n", "not JSON"),
        (b"[1]\n", "JSON object"),
        (b'{"error": "died"}\n', "died"),
        (b"1" * 9000, "longer"),
    ],
)
def test_bad_lines(sent, said):
    with hostile(LINES + b'{"a": 1}\n' + sent) as (url, _), pytest.raises(EngineError, match=said):
        list(lines_of(url))
