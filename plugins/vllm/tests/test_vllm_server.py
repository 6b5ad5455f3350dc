"""A real vLLM server on the loopback interface, and servers that are not what they should be."""

import os
import socket
import subprocess
import sys
import time

import polydraft
import pytest
from packaging.version import Version
from polydraft._load import prepare
from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    PolydraftError,
    UnsupportedError,
)
from polydraft_vllm.server.options import KEY_VARIABLE
from polydraft_vllm.versions import installed_vllm

pytest.importorskip("vllm")

TARGET = "builtin:tiny-e2b"
PROMPT = "def read_lines(path):\n"
GREEDY = {"max_new_tokens": 48, "ignore_eos": True}
KEY = "a-secret-that-no-error-may-show"


def load(target=TARGET, engine_options=None, **arguments):
    arguments = {"dtype": "float32", "num_speculative_tokens": 4, "context_length": 1024, **arguments}
    return polydraft.load(target, backend="vllm-server", engine_options=engine_options, **arguments)


@pytest.mark.parametrize("backend", ["vllm", "vllm-server"])
def test_the_build_is_known_where_the_engine_is_started_here(backend):
    prepared = prepare(TARGET, backend=backend, drafter="ngram")
    assert set(prepared.backend.build(prepared.request)) == {"vLLM", "vLLM's libraries", "torch"}


def test_the_build_of_a_running_server_is_not_known():
    prepared = prepare(TARGET, backend="vllm-server", drafter="ngram", engine_options={"url": "http://127.0.0.1:1"})
    assert prepared.backend.build(prepared.request) is None


@pytest.fixture(scope="module")
def own():
    """A session that started its own server; with an API key."""
    os.environ["VLLM_API_KEY"] = KEY
    options = {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 16}
    with load(engine_options=options) as session:
        yield session
    assert not session.engine.process.alive
    del os.environ["VLLM_API_KEY"]


@pytest.fixture(scope="module")
def client(own):
    """A second session, connected to the same server by its url."""
    with load(engine_options={"url": own.engine.client.url + "/v1/", "served_model_name": TARGET}) as session:
        yield session


def busy(session):
    samples = session.engine.client.metrics()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(sum(samples.get(name, {}).values()) for name in names)


def idle(session):
    deadline = time.monotonic() + 15
    while busy(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not busy(session)


def test_the_server_gives_what_the_engine_gives_in_process(own, mtp):
    wanted = mtp.generate(PROMPT, **GREEDY)
    found = own.generate(PROMPT, **GREEDY)
    assert found.token_ids == wanted.token_ids
    assert found.text == wanted.text
    assert found.stats.num_drafts == wanted.stats.num_drafts
    assert found.stats.accepted_per_position == wanted.stats.accepted_per_position


def test_what_runs(own, client):
    assert own.running.num_speculative_tokens == client.running.num_speculative_tokens == 4
    assert own.engine.abilities.plain_requests
    assert client.engine.abilities.plain_requests
    assert client.engine.abilities.reports_requests == (installed_vllm().release >= Version("0.29"))
    assert any("does not report its drafter" in note for note in client.running.notes)
    assert client.running.method == "mtp"


def test_one_request_without_speculation(own):
    plain = own.generate(PROMPT, speculate="off", **GREEDY)
    assert plain.token_ids == own.generate(PROMPT, **GREEDY).token_ids
    assert plain.stats.num_draft_tokens == 0
    assert plain.speculation_off.code == "caller"


def test_stop_strings_seeds_and_logprobs(own):
    whole = own.generate(PROMPT, **GREEDY)
    word = whole.text.split()[3]
    cut = own.generate(PROMPT, stop=[word], **GREEDY)
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.finish_reason == "stop"
    one, again, other = (own.generate(PROMPT, temperature=1.2, seed=seed, **GREEDY).token_ids for seed in (1, 1, 2))
    assert one == again != other
    entries = own.generate(PROMPT, logprobs=3, **GREEDY).logprobs
    assert [entry.token_id for entry in entries] == [entry.top[0][0] for entry in entries] == list(whole.token_ids)
    assert idle(own)


def test_many_at_once_and_closed_streams(client):
    wanted = client.generate(PROMPT, **GREEDY).token_ids
    assert {result.token_ids for result in client.generate_many([PROMPT] * 12, **GREEDY)} == {wanted}
    streams = [client.stream(PROMPT, max_new_tokens=900, ignore_eos=True) for _ in range(6)]
    for stream in streams:
        stream.start()
    next(streams[0])
    for stream in streams:
        stream.close()
    assert idle(client)


def test_acceptance_from_the_servers_counters(own):
    """Where responses hold no statistics, the server's counters give those of a request that ran alone."""
    from dataclasses import replace

    wanted = own.generate(PROMPT, **GREEDY).stats
    abilities, own.engine.abilities = own.engine.abilities, replace(own.engine.abilities, reports_requests=False)
    complete = own.engine.client.complete

    class Blind:
        """A response without the metrics, as older servers send it."""

        def __init__(self, answer):
            self.answer = answer

        def __enter__(self):
            self.answer.__enter__()
            return self

        def __exit__(self, *error):
            return self.answer.__exit__(*error)

        def __iter__(self):
            for event in self.answer:
                yield {name: value for name, value in event.items() if name != "metrics"}

        def finishing(self):
            self.answer.finishing()

    try:
        assert idle(own)
        own.engine.client.complete = lambda *arguments, **named: Blind(complete(*arguments, **named))
        found = own.generate(PROMPT, **GREEDY).stats
    finally:
        own.engine.abilities, own.engine.client.complete = abilities, complete
    assert (found.num_drafts, found.num_draft_tokens) == (wanted.num_drafts, wanted.num_draft_tokens)
    assert found.accepted_per_position == wanted.accepted_per_position


def test_the_servers_own_refusals_are_typed(own):
    with pytest.raises(ContextLengthError):
        own.generate(list(range(5, 1100)), max_new_tokens=4)
    sent = own.engine.client
    with pytest.raises(ModelNotFoundError, match="served_model_name"):
        sent.complete({"model": "other", "prompt": [5, 6], "max_tokens": 2})
    with pytest.raises(PolydraftError, match=r"refuses|context"):
        sent.complete({"model": TARGET, "prompt": [5] * 3000, "max_tokens": 2})


def test_a_wrong_key_is_reported_without_showing_any(own, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "another-secret")
    with pytest.raises(BackendUnavailableError, match="API key") as caught:
        load(engine_options={"url": own.engine.client.url})
    shown = f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"
    assert KEY_VARIABLE in shown
    assert "another-secret" not in shown
    assert KEY not in shown
    assert KEY not in own.engine.process.log.read_text()
    import psutil

    for process in psutil.Process(own.engine.process.pid), *psutil.Process(own.engine.process.pid).children(True):
        assert KEY not in " ".join(process.cmdline())


def test_a_server_of_another_model(own):
    with pytest.raises(ModelNotFoundError, match="serves builtin:tiny-e2b, not builtin:tiny-31b"):
        load("builtin:tiny-31b", engine_options={"url": own.engine.client.url})


@pytest.mark.parametrize(("name", "says"), [("no_such_option", "no engine argument"), ("hf_token", "HF_TOKEN")])
def test_options_of_a_server_of_our_own_are_checked(name, says):
    with pytest.raises(InvalidRequestError, match=says):
        load(engine_options={name: "x"})


def test_engine_options_together_with_a_url(own):
    with pytest.raises(InvalidRequestError, match="max_num_seqs"):
        load(engine_options={"url": own.engine.client.url, "max_num_seqs": 3})


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidRequestError, match="another port"):
        load(engine_options={"port": taken.getsockname()[1]})


def test_a_server_that_cannot_start_says_why():
    with pytest.raises(PolydraftError) as caught:
        load(engine_options={"kv_cache_memory_bytes": 1000})
    assert "memory" in str(caught.value).lower()


def test_serve_prints_the_command_it_runs():
    line = [
        sys.executable,
        "-m",
        "polydraft",
        "serve",
        "--own-server",
        "-b",
        "vllm",
        "-m",
        TARGET,
        "--print",
        "--port",
        "8123",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    assert '--speculative-config \'{"method": "mtp"' in done.stdout
    assert "--port 8123" in done.stdout
    assert "polydraft_vllm.scheduler.scheduler" in done.stdout


def test_a_server_without_speculation_is_found_out(own):
    """A drafter that the server does not have is not reported as running; plain requests need no scheduler of ours."""
    options = {"kv_cache_memory_bytes": 1 << 26}
    with (
        load(drafter=None, num_speculative_tokens=None, engine_options=options) as plain,
        load(engine_options={"url": plain.engine.client.url}) as session,
    ):
        assert session.running.method is None
        assert session.running.speculation_off.code == "engine"
        result = session.generate(PROMPT, **GREEDY)
        assert result.stats.num_draft_tokens == 0
        sampled = session.generate(PROMPT, min_p=0.99, temperature=1.5, seed=1, **GREEDY)
        assert sampled.token_ids == result.token_ids  # only the best token is kept
        with pytest.raises(UnsupportedError):
            session.generate(PROMPT, speculate="on", **GREEDY)


def test_a_server_that_dies_in_mid_stream(own, client):
    """The error has the text so far; later calls cannot connect. The last test of the shared server."""
    whole = client.generate(PROMPT, max_new_tokens=600, ignore_eos=True).text
    stream = client.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    for _ in range(4):
        next(stream)
    own.engine.process.kill()
    with pytest.raises(EngineError) as caught:
        list(stream)
    assert caught.value.partial_text
    assert whole.startswith(caught.value.partial_text[:200])
    with pytest.raises(PolydraftError, match="No connection"):
        client.generate(PROMPT, **GREEDY)
