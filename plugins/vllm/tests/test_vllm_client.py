"""The client with servers that are not what they should be: real sockets, made-up answers. vLLM does not run."""

import contextlib
import http.server
import itertools
import json
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback

import polydraft
import pytest
from polydraft._load import prepare
from polydraft.errors import (
    BackendUnavailableError,
    EngineError,
    InvalidRequestError,
    NonFiniteLogitsError,
    PolydraftError,
    UnsupportedError,
)
from polydraft.secrets import Secret
from polydraft_vllm.server.client import EndedByErrorError, ServerClient
from polydraft_vllm.server.inspection import _TEXT, inspect
from polydraft_vllm.server.options import KEY_VARIABLE, VllmServerOptions
from polydraft_vllm.tokenizer import load_tokenizer

TARGET = "builtin:tiny-e2b"
PROMPT = "def read_lines(path):\n"
KEY = "a-secret-that-no-error-may-show"
MODELS = {"data": [{"id": TARGET, "owned_by": "vllm", "max_model_len": 1024}]}
OK = {"/version": {"version": "0.32.0"}, "/v1/models": MODELS}
"""Answers to GET; others are 404, as for a server that shows neither counters nor a tokenizer."""


def event(token_ids, reason=None, logprob=-0.5):
    count = len(token_ids) if isinstance(token_ids, list) else 0
    logprobs = {"token_logprobs": [logprob] * count, "top_logprobs": [None] * count}
    choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": token_ids, "logprobs": logprobs}
    return {"id": "x", "object": "text_completion", "created": 1, "model": TARGET, "choices": [choice]}


EVENTS = [event([5, 6]), event([7], "length")]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's tables say."""

    def do_GET(self):
        self.server.seen.append(self.path)
        found = self.server.answers.get(self.path)
        if isinstance(found, str):
            self.send_response(302)
            self.send_header("Location", found)
            self.end_headers()
            return
        self._send(404 if found is None else 200, b"{}" if found is None else found)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.path)
        if self.path != "/v1/completions":
            self._send(404, b"{}")
        elif isinstance(self.server.events, int):
            said = f"Refused: {self.headers['Authorization']}"
            self._send(self.server.events, {"error": {"message": said}})
        elif callable(self.server.events[0]):
            self._send(200, b"", "text/event-stream")
            with contextlib.suppress(OSError):
                for one in self.server.events[0]():
                    self.wfile.write(one if isinstance(one, bytes) else f"data: {json.dumps(one)}\n\n".encode())
        else:
            lines = [one if isinstance(one, str) else json.dumps(one) for one in (*self.server.events, "[DONE]")]
            self._send(200, "".join(f"data: {line}\n\n" for line in lines).encode(), "text/event-stream")

    def _send(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *args):
        """Say nothing."""


@contextlib.contextmanager
def serving(answers=OK, events=(), context=None):
    """A server with these answers; gives its url and what it was asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.events, server.seen = answers, events, []
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}", server.seen
    finally:
        server.shutdown()
        server.server_close()


def load(url, **options):
    options = {"url": url, "read_timeout": 5, "connect_retries": 0, **options}
    return polydraft.load(
        TARGET, backend="vllm-server", num_speculative_tokens=4, dtype="float32", engine_options=options
    )


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(BackendUnavailableError, match="No connection"):
        load(f"http://127.0.0.1:{port}")


SOMEBODYS = {"data": [{"id": TARGET, "owned_by": "somebody"}]}
NOT_VLLM = {
    "plain files": {},
    "another OpenAI-compatible server": {**OK, "/v1/models": SOMEBODYS},
    "no version": {"/version": [1], "/v1/models": MODELS},
    "HTML": {"/version": b"<html>", "/v1/models": MODELS},
    "models of another shape": {**OK, "/v1/models": {"data": 5}},
    "a length that is none": {**OK, "/v1/models": {"data": [{**MODELS["data"][0], "max_model_len": "long"}]}},
    "a negative length": {**OK, "/v1/models": {"data": [{**MODELS["data"][0], "max_model_len": -5}]}},
    "counters that are none": {**OK, "/metrics": b"vllm:spec_decode_num_drafts_total{} many\n"},
}


@pytest.mark.parametrize("answers", NOT_VLLM.values(), ids=NOT_VLLM)
def test_a_server_that_is_not_vllm(answers):
    with serving(answers, EVENTS) as (url, _), pytest.raises(BackendUnavailableError, match="not a vLLM server"):
        load(url)


@pytest.mark.parametrize(
    ("events", "error", "says"),
    [
        ([{"id": "x", "choices": None}], BackendUnavailableError, "not a vLLM server"),
        ([event([5]), "{nonsense"], BackendUnavailableError, "not a vLLM server"),
        ([event(None), event(None, "length")], UnsupportedError, "no token ids"),
        ([event([5]), event([6], "length", None)], NonFiniteLogitsError, "target's logits .* not finite"),
        ([event([5])], EngineError, "broke off"),
        ([event([5]), {"error": {"message": "it died", "code": 500}}], EngineError, "it died"),
        (429, EngineError, "429"),
        (503, EngineError, "503"),
    ],
    ids=str,
)
def test_answers_of_another_shape(events, error, says):
    with serving(OK, events) as (url, _), pytest.raises(error, match=says):
        load(url)


def slowly(*events):
    for one in events:
        time.sleep(0.05)
        yield one


def metrics(**changed):
    counts = {"num_spec_tokens": 4, "num_spec_steps": 1, "num_draft_tokens": 4, "num_accepted_draft_tokens": 2}
    return {"choices": [], "metrics": {"speculative_decoding": {**counts, "acceptance_histogram": [], **changed}}}


FIRST, LAST, EMPTY = event([300]), event([301, 302], "length"), {"choices": []}
HOSTILE = {
    "more tokens than were asked for": (lambda: itertools.repeat(FIRST), "after the 3 tokens that were asked for"),
    "nothing more": (lambda: itertools.chain([FIRST], slowly(*[b""] * 99)), "sent no event for 2 seconds"),
    "only comments": (lambda: itertools.chain([FIRST], slowly(*[b": ping\n\n"] * 99)), "no event for 2 seconds"),
    "empty events, slowly": (lambda: itertools.chain([FIRST], slowly(*[EMPTY] * 99)), "did not end its answer in time"),
    "empty events": (lambda: itertools.chain([FIRST], itertools.repeat({"choices": [], "x": "y" * 9999})), "sent more"),
    "an endless line": (
        lambda: itertools.chain([FIRST, b"data: "], itertools.repeat(b"x" * 65536)),
        "a line is longer",
    ),
    "no end after the last token": (
        lambda: itertools.chain([FIRST, LAST], slowly(*[EMPTY] * 99)),
        "did not end its answer in time",
    ),
    "too large an id": (lambda: [FIRST, event([10**6], "length")], "1000000 is not a token id"),
    "a negative id": (lambda: [FIRST, event([-1], "length")], "-1 is not a token id"),
    "a text for an id": (lambda: [FIRST, event(["6"], "length")], "6 is not a token id"),
    "a fraction": (lambda: [FIRST, event([6.5], "length")], "6.5 is not a token id"),
    "no list": (lambda: [FIRST, event(6, "length")], "not a list"),
    "no choices": (lambda: [FIRST, {}], "choices"),
    "deep": (lambda: [FIRST, b"data: " + b"[" * 200_000 + b"\n\n"], "nested too deeply"),
    "statistics of another shape": (lambda: [FIRST, LAST, metrics(num_draft_tokens="many")], "statistics"),
    "statistics that cannot be": (lambda: [FIRST, LAST, metrics(num_accepted_draft_tokens=5)], "statistics"),
}


def test_hostile_answers_end_in_time_and_the_session_goes_on():
    good = [*EVENTS[:1], event([7], "length")]
    events = list(good)
    with serving(OK, events) as (url, _), load(url, read_timeout=2, token_timeout=0.1) as session:
        text = session.generate(PROMPT, max_new_tokens=3, ignore_eos=True).text
        for name, (answer, says) in HOSTILE.items():
            events[:] = [answer]
            started = time.monotonic()
            with pytest.raises(EngineError) as caught:
                session.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
            assert says in str(caught.value), name
            assert url in str(caught.value), name
            assert caught.value.partial_text, name
            assert time.monotonic() - started < 30, name
            events[:] = good
            assert session.generate(PROMPT, max_new_tokens=3, ignore_eos=True).text == text


def test_log_probabilities_of_another_shape():
    events = list(EVENTS)
    shapes = (None, {}, {"token_logprobs": [], "top_logprobs": []}, {"token_logprobs": ["low"], "top_logprobs": [None]})
    with serving(OK, events) as (url, _), load(url) as session:
        for logprobs in shapes:
            other = event([301], "length")
            other["choices"][0]["logprobs"] = logprobs
            events[:] = [FIRST, other]
            with pytest.raises(EngineError, match="not have") as caught:
                session.generate(PROMPT, max_new_tokens=3, ignore_eos=True, logprobs=1)
            assert caught.value.partial_text, logprobs
        events[:] = [FIRST, event([301], "length", None)]
        with pytest.raises(NonFiniteLogitsError, match=r"logits for position \d+ ") as caught:
            session.generate(PROMPT, max_new_tokens=3, ignore_eos=True, logprobs=1)
        assert caught.value.partial_text


def test_a_request_that_the_server_ends_by_an_error():
    """polydraft's scheduler does so at the first row that is not finite; of other servers the reason is not known."""
    request = prepare(TARGET, backend="vllm-server", drafter=None).request
    tokenizer = load_tokenizer(request.target.path, request)
    with serving(OK, [event([300, 301]), {"error": {"message": "Internal server error", "code": 500}}]) as (url, _):
        client = ServerClient(url, VllmServerOptions())
        with pytest.raises(NonFiniteLogitsError, match=r"position \d+ .*float32") as caught:
            inspect(client, request, tokenizer, None, "float32")
        assert f"position {len(tokenizer.encode(_TEXT * 4)) + 2} " in str(caught.value)
        with pytest.raises(EndedByErrorError, match="Look at its log"):
            inspect(client, request, tokenizer, None)


def test_errors_in_the_middle_of_an_answer():
    """What the server says is told, whatever status it names."""
    events = list(EVENTS)
    with serving(OK, events) as (url, _), load(url) as session:
        for code, error in {400: InvalidRequestError, 500: EngineError, None: EngineError}.items():
            events[:] = [FIRST, {"error": {"message": "out of luck", "code": code}}]
            with pytest.raises(error, match=r"(failed|refuses).*out of luck"):
                session.generate(PROMPT, max_new_tokens=3, ignore_eos=True)


def test_cancelled_from_another_thread_while_the_server_is_silent():
    events = list(EVENTS)
    with serving(OK, events) as (url, _), load(url, read_timeout=60) as session:
        events[:] = [lambda: itertools.chain([FIRST], slowly(*[b""] * 200))]
        stream = session.stream(PROMPT, max_new_tokens=3, ignore_eos=True)
        next(stream)
        threading.Timer(0.2, stream.cancel).start()
        started = time.monotonic()
        assert [chunk.finish_reason for chunk in stream][-1] == "cancelled"
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("counters", "says"), [(None, "does not report"), (b"vllm:num_requests_running 0\n", "runs without speculation")]
)
def test_what_a_server_does_not_report_is_not_assumed(counters, says):
    answers = {**OK, "/metrics": counters}
    with serving(answers, EVENTS) as (url, _), load(url) as session:
        assert session.running.method is None
        assert says in session.running.speculation_off.message
        stats = session.generate(PROMPT, max_new_tokens=3, ignore_eos=True).stats
    assert stats.num_draft_tokens == (None if counters is None else 0)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "nonsense",
            "",
            "ftp://host",
            "http://",
            "http://host:port",
            "http://host:99999",
            "http://[::1",
            "http://\x01",
        ),
        *("http://user:password@host:1", "http://host:1/?key=password", "http://host:1/#password"),
    ],
)
def test_bad_urls(url):
    with pytest.raises(InvalidRequestError) as caught:
        load(url)
    assert "password" not in str(caught.value).replace("a password", "")


def test_urls():
    assert VllmServerOptions(url="https://host:8000/v1/").url == "https://host:8000"
    assert VllmServerOptions(url="http://host/prefix").url == "http://host/prefix"


def test_what_was_sent_is_never_sent_again():
    """A server that takes a generation and hangs up sees it once; one that cannot be reached is tried again."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for _ in range(2):
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(65536))

        threading.Thread(target=serve, daemon=True).start()
        options = VllmServerOptions(connect_retries=3, read_timeout=5)
        connected = ServerClient(f"http://127.0.0.1:{server.getsockname()[1]}", options)
        with pytest.raises(EngineError, match="broke"):
            connected.complete({"model": "m", "prompt": [1], "max_tokens": 1})
        time.sleep(0.5)
    assert len(seen) == 1


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_refusals_are_not_sent_again_and_show_no_key(status, monkeypatch, caplog):
    """Some servers show the request's key in their errors."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with serving(OK, status) as (url, seen), pytest.raises(PolydraftError) as caught:
        load(url, connect_retries=3)
    assert seen.count("/v1/completions") == 1
    assert KEY not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_a_key_with_a_line_end_works(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", f"{KEY}\r\n")
    with serving(OK, EVENTS) as (url, _):
        load(url).close()


def test_the_key_of_this_backend_comes_before_vllms(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert VllmServerOptions().key() is None
    monkeypatch.setenv("VLLM_API_KEY", "one")
    assert VllmServerOptions().key() == Secret("one")
    monkeypatch.setenv(KEY_VARIABLE, "other")
    assert VllmServerOptions().key() == Secret("other")


@pytest.mark.parametrize("key", [f"{KEY}\u00e4", f"a\n{KEY}", f"a\x07{KEY}"])
def test_a_key_that_no_header_can_hold(key, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(InvalidRequestError, match="VLLM_API_KEY") as caught:
        load("http://127.0.0.1:1")
    assert KEY not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_a_redirect_is_not_followed():
    """The key would go along, and another server's answers would be taken for this one's."""
    with serving() as (other, asked), serving({"/version": f"{other}/version"}) as (url, _):
        with pytest.raises(BackendUnavailableError, match="redirects to another address"):
            load(url)
        assert asked == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificates_are_verified(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    line += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(line, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(OK, EVENTS, context) as (url, seen):
        with pytest.raises(BackendUnavailableError, match=r"CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
            load(url)
        assert seen == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        load(url).close()


def test_no_proxy_stands_before_a_server_of_our_own(monkeypatch):
    with serving({}) as (proxy, asked), serving() as (url, _):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert ServerClient(url, VllmServerOptions(), own=True).version() == "0.32.0"
        assert asked == []
        with pytest.raises(BackendUnavailableError):
            ServerClient(url, VllmServerOptions()).version()
        assert len(asked) == 1
