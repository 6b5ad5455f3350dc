"""The client of llama-server with servers that are not what they should be: real sockets, made-up answers."""

import contextlib
import http.server
import itertools
import json
import threading
import time
import traceback

import polydraft
import pytest
from polydraft.errors import BackendUnavailableError, EngineError, InvalidRequestError, PolydraftError
from polydraft_llama_cpp.server.options import LlamaServerOptions

KEY = "canary-8f31"
TEXT = "def main():\n    return 'naïve', 12345 # ☃"


def event(token_ids, drafted=0, accepted=0, **fields):
    timings = {"predicted_ms": 1.0, "draft_n": drafted, "draft_n_accepted": accepted}
    return {"content": "x", "tokens": token_ids, "stop": False, "timings": timings, **fields}


END = {"content": "", "tokens": [], "stop": True}
GOOD = [event([300]), event([301]), event([302]), END]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's attributes say."""

    def do_GET(self):
        self._send(200, self.server.props)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._send(200, {"tokens": self.server.tokens})
            return
        if not body.get("stream"):  # the client looks at the target's logits
            self._send(200, {"completion_probabilities": [{"logprob": -0.1}], "timings": {}})
            return
        answer = self.server.answer
        if isinstance(answer, int):
            self._send(answer, {"error": {"message": f"refused: {self.headers['Authorization']}\x1b[31m"}})
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for one in answer():
                self.wfile.write(one if isinstance(one, bytes) else f"data: {json.dumps(one)}\n\n".encode())

    def _send(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server(gguf):
    """A server of tiny-e2b; its url is ``server.url``."""
    with polydraft.load(gguf("tiny-e2b"), backend="llama_cpp", drafter=None) as session:
        tokens = session.tokenizer.encode(TEXT)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.props, server.tokens = {"default_generation_settings": {"n_ctx": 512}}, tokens
    server.answer, server.url = lambda: GOOD, f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(gguf, server, **options):
    options = {"url": server.url, "read_timeout": 2, "token_timeout": 0.1, **options}
    return polydraft.load(gguf("tiny-e2b"), backend="llama-server", drafter=None, engine_options=options)


def generate(session):
    return session.generate([2, 3, 4], max_new_tokens=3, ignore_eos=True)


def slowly(*events):
    for one in events:
        time.sleep(0.05)
        yield one


ANSWER = GOOD[:2]
EMPTY = {"content": "", "tokens": [], "stop": False}
HOSTILE = {
    "more tokens than were asked for": (lambda: [event([300]), event([301, 302, 303])], "after the 3 tokens"),
    "nothing more": (lambda: itertools.chain(ANSWER, slowly(*[b""] * 99)), "sent no event for 2 seconds"),
    "only comments": (lambda: itertools.chain(ANSWER, slowly(*[b": ping\n\n"] * 99)), "no event for 2 seconds"),
    "empty events, slowly": (
        lambda: itertools.chain(ANSWER, slowly(*[EMPTY] * 99)),
        "did not end its answer in time",
    ),
    "empty events": (lambda: itertools.chain(ANSWER, itertools.repeat({**EMPTY, "x": "y" * 9999})), "sent more than"),
    "an endless line": (
        lambda: itertools.chain(ANSWER, [b"data: "], itertools.repeat(b"x" * 65536)),
        "line is longer",
    ),
    "too large an id": (lambda: [event([300]), event([301]), event([10**6])], "1000000 is not a token id"),
    "a negative id": (lambda: [event([300]), event([301]), event([-1])], "-1 is not a token id"),
    "a text for an id": (lambda: [event([300]), event([301]), event(["6"])], "6 is not a token id"),
    "a fraction": (lambda: [event([300]), event([301]), event([6.5])], "6.5 is not a token id"),
    "no list": (lambda: [event([300]), event([301]), event(6)], "not a list"),
    "an answer without tokens": (lambda: [END], "without tokens"),
    "an error": (lambda: [*ANSWER, {"error": {"code": 500, "message": "it died"}}], "it died"),
    "an error line": (lambda: [*ANSWER, b'error: {"code": 500, "message": "it died"}\n\n'], "it died"),
    "it hangs up": (lambda: ANSWER, "before it was complete"),
    "deep": (lambda: [*ANSWER, b"data: " + b"[" * 200_000 + b"\n\n"], "nested too deeply"),
    "timings of another shape": (lambda: [*ANSWER, event([302], "many")], "timings"),
    "timings that cannot be": (lambda: [*ANSWER, event([302], 1, 2)], "more drafts than there were"),
    "no timings": (lambda: [*ANSWER, {**event([302]), "timings": [1]}], "timings"),
    "refused": (500, "failed (500): refused"),
}


def test_hostile_answers_end_in_time_and_the_session_goes_on(gguf, server):
    with load(gguf, server) as session:
        text = generate(session).text
        for name, (answer, says) in HOSTILE.items():
            server.answer = answer
            started = time.monotonic()
            with pytest.raises(EngineError) as caught:
                generate(session)
            assert says in str(caught.value), name
            assert time.monotonic() - started < 30, name
            assert caught.value.partial_text == "" or text.startswith(caught.value.partial_text), name
            server.answer = lambda: GOOD
            assert generate(session).text == text


def test_the_partial_text_is_kept(gguf, server):
    with load(gguf, server) as session:
        text = generate(session).text
        answers = iter([[event([300]), END], [event([301], predicted_ms=2), END]])
        server.answer = lambda: next(answers, GOOD[:1])
        with pytest.raises(EngineError, match="before it was complete") as caught:
            generate(session)
    assert caught.value.partial_text
    assert text.startswith(caught.value.partial_text)


def test_cancelled_from_another_thread_while_the_server_is_silent(gguf, server):
    with load(gguf, server, read_timeout=60) as session:
        server.answer = lambda: itertools.chain([event([300]), event([301], predicted_ms=2)], slowly(*[b""] * 200))
        stream = session.stream([2, 3, 4], max_new_tokens=3, ignore_eos=True)
        threading.Timer(0.3, stream.cancel).start()
        started = time.monotonic()
        assert [chunk.finish_reason for chunk in stream][-1] == "cancelled"
        assert time.monotonic() - started < 30
        server.answer = lambda: GOOD
        assert generate(session).token_ids == (300, 301, 302)


@pytest.mark.parametrize(
    "props",
    [
        b"<html>",
        {},
        [1],
        {"default_generation_settings": {"n_ctx": "many"}},
        {"default_generation_settings": {"n_ctx": -1}},
    ],
    ids=str,
)
def test_a_server_of_another_kind(gguf, server, props):
    server.props = props
    with pytest.raises(BackendUnavailableError, match=r"not a llama-server|No llama-server"):
        load(gguf, server)


def test_a_key_is_sent_and_never_shown(gguf, server, tmp_path, caplog):
    caplog.set_level("DEBUG")
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    for options in ({"api_key": KEY}, {"api_key_file": file}):
        server.answer = lambda: GOOD
        with load(gguf, server, **options) as session:
            assert session.engine.server.client.key.reveal() == KEY
            shown = f"{session!r}{session.running!r}{generate(session)!r}{vars(session.engine)}"
            server.answer = 400
            with pytest.raises(EngineError, match=r"refused: Bearer \*\*\*\\x1b") as caught:
                generate(session)
        assert KEY not in shown + "".join(traceback.format_exception(caught.value)) + caplog.text


@pytest.mark.parametrize(
    "words", [["--api-key", KEY], [f"--api-key={KEY}"], [f" --api-key {KEY}"], ["-hft", KEY], ["--hf-token", KEY]]
)
def test_flags_of_the_server_hold_no_secrets(gguf, words):
    with pytest.raises(InvalidRequestError, match="other users can read command lines") as caught:
        polydraft.load(gguf("tiny-e2b"), backend="llama-server", engine_options={"extra_args": words})
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert LlamaServerOptions(extra_args=("--api-key-file", "f")).extra_args == ("--api-key-file", "f")


def test_control_characters_of_a_path_are_escaped(tmp_path):
    with pytest.raises(PolydraftError) as caught:
        polydraft.load(tmp_path / "a\x1b[31m.gguf", backend="llama_cpp", drafter=None)
    assert str(caught.value).isprintable()
