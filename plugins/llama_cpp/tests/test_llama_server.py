"""The backend llama-server: with the user's binary if there is one, and with a stand-in that answers as it did."""

import contextlib
import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import polydraft
import pytest
from polydraft._load import prepare
from polydraft.errors import (
    BackendUnavailableError,
    DeviceError,
    EngineError,
    InvalidRequestError,
    ModelFormatError,
    NonFiniteLogitsError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft_gguf.environment import needed_environment
from polydraft_llama_cpp.server.options import KEY_VARIABLE, URL_VARIABLE
from polydraft_llama_cpp.server.program import VARIABLE, program

BINARY = os.environ.get(VARIABLE)
STAND_IN = Path(__file__).parent / "data/stand_in_server.py"
real = pytest.mark.skipif(BINARY is None, reason=f"{VARIABLE} names no llama-server")
PROMPT = [2, *range(300, 340)]


def load(gguf, name="tiny-e2b", drafter="tiny-e2b-assistant", **arguments):
    drafter = gguf(drafter) if drafter else None
    return polydraft.load(gguf(name), backend="llama-server", drafter=drafter, device="cpu", **arguments)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A function: use the stand-in in one of its modes."""

    def use(mode):
        script = tmp_path / "llama-server"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(VARIABLE, str(script))
        monkeypatch.setenv("STAND_IN", mode)
        program.cache_clear()

    yield use
    program.cache_clear()


# --- the stand-in: what our side does --------------------------------------------------------------------------------
def test_rounds_are_read_from_the_timings(gguf, stand_in):
    stand_in("good")
    with load(gguf) as session:
        chunks = list(session.stream([2, 3, 4], max_new_tokens=10))
        assert [len(chunk.token_ids) for chunk in chunks] == [1, 3, 3, 3]
        assert [chunk.num_accepted_tokens for chunk in chunks] == [0, 2, 2, 2]
        assert [chunk.num_draft_tokens for chunk in chunks] == [0, 4, 4, 4]
        assert [token for chunk in chunks for token in chunk.token_ids] == list(range(300, 310))


def test_the_build_is_the_program_s_bytes_and_those_of_its_libraries(gguf, stand_in, monkeypatch, tmp_path):
    def build():
        prepared = prepare(gguf("tiny-e2b"), backend="llama-server", drafter=gguf("tiny-e2b-assistant"), device="cpu")
        return prepared.backend.build(prepared.request)

    stand_in("good")
    first = build()
    (tmp_path / "notes.txt").write_text("not a library")
    assert build() == first
    (tmp_path / "libggml-cpu.so.0").write_bytes(b"kernels")
    second = build()
    script = Path(os.environ[VARIABLE])
    script.write_text(script.read_text() + "# rebuilt\n")
    assert len({str(found) for found in (first, second, build())}) == 3
    monkeypatch.setenv(URL_VARIABLE, "http://127.0.0.1:8124")
    assert build() is None  # who knows what runs there


def test_the_command_that_serves_a_pair(gguf, stand_in, monkeypatch):
    stand_in("good")
    pair = {"backend": "llama-server", "drafter": gguf("tiny-e2b-assistant"), "device": "cpu"}
    prepared = prepare(gguf("tiny-e2b"), num_speculative_tokens=3, context_length=64, **pair)
    found = prepared.backend.server_command(prepared.request, host="127.0.0.1", port=8123)
    command = found.arguments
    assert found.environment == needed_environment()
    assert command[0] == os.environ[VARIABLE]
    assert command[-4:] == ("--host", "127.0.0.1", "--port", "8123")
    for flag, value in (("--model", gguf("tiny-e2b")), ("--spec-draft-n-max", 3), ("--spec-type", "draft-mtp")):
        assert command[command.index(flag) + 1] == str(value)
    monkeypatch.setenv(URL_VARIABLE, "http://127.0.0.1:8124")
    prepared = prepare(gguf("tiny-e2b"), **pair)
    with pytest.raises(UnsupportedError, match="runs already"):
        prepared.backend.server_command(prepared.request, host="127.0.0.1", port=8123)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (
            {"engine_options": {"read_timeout": 5, "start_timeout": 5}},
            InvalidRequestError,
            "read_timeout, start_timeout",
        ),
        ({"prefix_cache_bytes": 0}, UnsupportedError, "`prefix_cache_bytes=0` has no effect"),
    ],
)
def test_a_command_has_no_use_for_a_clients_options(gguf, stand_in, asked, error, words):
    stand_in("good")
    prepared = prepare(gguf("tiny-e2b"), backend="llama-server", drafter=None, device="cpu", **asked)
    with pytest.raises(error, match=words):
        prepared.backend.server_command(prepared.request, host="127.0.0.1", port=8123)


def test_an_end_that_is_none_here_is_gone_past(gguf, stand_in):
    stand_in("good")
    with load(gguf) as session:
        ended = session.generate([2, 3, 4], max_new_tokens=20)
        assert (ended.finish_reason, ended.token_ids[-1], len(ended.token_ids)) == ("eos", 1, 11)
        going = session.generate([2, 3, 4], max_new_tokens=20, ignore_eos=True)
        assert going.token_ids == (*range(300, 310), 1, *range(311, 320))


@pytest.mark.parametrize("speculate", ["off", "auto"])
def test_logits_that_are_nan_later_on(gguf, stand_in, speculate):
    """Tokens come out of NaN logits, too: the same one over and over."""
    stand_in("late")
    with load(gguf) as session:
        # Too short to be looked at: the end is not one token over and over.
        assert session.generate([5, 6, 7], max_new_tokens=3, speculate=speculate).token_ids == (300, 301, 302)
        with pytest.raises(NonFiniteLogitsError, match=f"not finite .computed in {session.running.dtype}"):
            session.generate([5, 6, 7], max_new_tokens=16, speculate=speculate)


def test_plain_calls_go_to_a_second_server(gguf, stand_in):
    stand_in("good")
    with load(gguf) as session:
        result = session.generate([2, 3, 4], max_new_tokens=5, speculate="off")
        assert result.stats.num_draft_tokens == 0
        processes = [session.engine.server.process, session.engine.plain_server.process]
        assert processes[0] is not processes[1]
        assert all(process.alive for process in processes)
    assert not any(process.alive for process in processes)


def test_a_stop_inside_an_answer_ends_it(gguf, stand_in):
    stand_in("good")
    with load(gguf) as session:
        result = session.generate([2, 3, 4], max_new_tokens=10, stop_token_ids=[305])
        assert (result.finish_reason, result.token_ids) == ("stop", tuple(range(300, 306)))


@pytest.mark.parametrize(("device", "weights"), [("cpu", "f32"), ("auto", "bf16")])
def test_auto_is_what_the_device_multiplies(data, stand_in, monkeypatch, device, weights):
    """On the processor by the rule of all engines; on a GPU the checkpoint's own."""
    stand_in("gpu")
    monkeypatch.setattr("polydraft.hardware.multiplies_natively", lambda name: name == "float32")
    pair = {"drafter": data / "tiny-llama-draft", "device": device}
    prepared = prepare(data / "tiny-llama", backend="llama-server", **pair)
    command = prepared.backend.server_command(prepared.request, host="127.0.0.1", port=8123).arguments
    for flag in ("--model", "--spec-draft-model"):
        assert command[command.index(flag) + 1].endswith(f"-{weights}.gguf")


def flags(session):
    """The command line of the server with the drafter."""
    line = Path(f"/proc/{session.engine.server.process.pid}/cmdline").read_text().split("\0")
    return {flag: value for flag, value in itertools.pairwise(line) if flag.startswith("--")}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at /proc")
@pytest.mark.parametrize(
    ("device", "runs_on", "own", "heads", "flash"),
    [
        ("auto", "cuda:0,cuda:1", None, {256, 512}, "on"),
        ("cuda:1", "cuda:1", "CUDA1", {256, 512}, "on"),
        ("cuda", "cuda:0", "CUDA0", {256, 512}, "on"),
        ("cuda", "cuda:0", "CUDA0", {32}, "off"),  # the built-in pairs': no GPU of llama.cpp has a kernel for them
        ("cpu", "cpu", "none", {256, 512}, "off"),
    ],
)
def test_devices(gguf, stand_in, monkeypatch, device, runs_on, own, heads, flash):
    stand_in("gpu")
    monkeypatch.setattr("polydraft_gguf.options.head_sizes", lambda header: tuple(heads))
    with polydraft.load(
        gguf("tiny-e2b"), backend="llama-server", drafter=gguf("tiny-e2b-assistant"), device=device
    ) as session:
        assert session.running.device == runs_on
        on_cuda = runs_on != "cpu"
        assert session.running.matmul_precision == ("tf32" if on_cuda else None)
        assert on_cuda == any("float32 matrix products to tf32" in note for note in session.running.notes)
        found = flags(session)
    assert (found.get("--device"), found.get("--spec-draft-device"), found["--flash-attn"]) == (own, own, flash)


def test_options_that_do_not_fit(gguf, stand_in):
    stand_in("good")
    with pytest.raises(DeviceError, match="cuda"):
        polydraft.load(gguf("tiny-e2b"), backend="llama-server", drafter=None, device="cuda")
    with pytest.raises(InvalidRequestError, match="runs on the CPU"):
        load(gguf, engine_options={"n_gpu_layers": -1})
    with pytest.raises(InvalidRequestError, match="n_batch"):
        load(gguf, num_speculative_tokens=8, engine_options={"n_batch": 8})


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("silent", SpeculationUnavailableError, "drafts nothing"),
        ("nan", NonFiniteLogitsError, "target's logits .* not finite"),
        ("old", SpeculationUnavailableError, "does not have --spec-draft-n-max"),
        ("crash", ModelFormatError, "unknown model architecture"),
        ("other", BackendUnavailableError, "is not llama-server"),
    ],
)
def test_what_is_wrong_is_said(gguf, stand_in, mode, error, said):
    stand_in(mode)
    with pytest.raises(error, match=said):
        load(gguf)


def test_no_server(gguf, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/no/such/llama-server")
    program.cache_clear()
    with pytest.raises(BackendUnavailableError, match="cannot be started"):
        load(gguf)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendUnavailableError, match=r"No llama-server was found\.") as error:
        load(gguf)
    assert VARIABLE in error.value.hint
    assert URL_VARIABLE in error.value.hint


def test_no_server_at_the_url(gguf, monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(BackendUnavailableError, match="No llama-server answers at"):
        load(gguf)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://localhost", "http://user:secret@localhost", "http://[::1"])
def test_a_url_that_is_not_a_servers(gguf, url):
    with pytest.raises(InvalidRequestError) as error:
        load(gguf, engine_options={"url": url})
    assert "secret" not in str(error.value)


def test_a_url_in_the_variable_for_the_program(gguf, monkeypatch):
    monkeypatch.setenv(VARIABLE, "http://127.0.0.1:8080")
    with pytest.raises(BackendUnavailableError, match=f"Set {URL_VARIABLE} to the URL of a running server"):
        load(gguf)


def test_a_url_and_options_for_a_server_of_our_own(gguf):
    options = {"url": "http://127.0.0.1:9", "start_timeout": 5, "n_batch": 64}
    with pytest.raises(InvalidRequestError, match="n_batch, start_timeout cannot be set: with url"):
        load(gguf, engine_options=options)


TEXT = "def main():\n    return 'naïve', 12345 # ☃"


@pytest.mark.parametrize("variable", [KEY_VARIABLE, "LLAMA_API_KEY"])
def test_the_key_of_a_running_server_comes_from_the_environment(gguf, stand_in, monkeypatch, variable):
    stand_in("good")
    with polydraft.load(gguf("tiny-e2b"), backend="llama_cpp", drafter=None) as session:
        monkeypatch.setenv("STAND_IN_TOKENS", json.dumps(session.tokenizer.encode(TEXT)))
    with load(gguf) as owner:
        client = owner.engine.server.client
        options = {"url": client.url}
        monkeypatch.delenv("LLAMA_API_KEY", raising=False)
        with pytest.raises(BackendUnavailableError, match="does not accept the API key") as error:
            load(gguf, engine_options=options)
        assert KEY_VARIABLE in error.value.hint
        monkeypatch.setenv("LLAMA_API_KEY", "wrong")
        monkeypatch.setenv(variable, client.key.reveal())
        with load(gguf, engine_options=options) as session:
            assert (session.running.engine_version, session.running.context_length) == ("b0-stand-in", 512)
            assert session.generate([2, 3, 4], max_new_tokens=4).token_ids == (300, 301, 302, 303)
            with pytest.raises(UnsupportedError, match="drafts for every request"):
                session.generate([2, 3, 4], max_new_tokens=4, speculate="off")
        assert owner.generate([2, 3, 4], max_new_tokens=4).token_ids == (300, 301, 302, 303)


def test_another_model_at_the_url(gguf, stand_in, monkeypatch):
    stand_in("good")
    monkeypatch.setenv("STAND_IN_TOKENS", "[1, 2]")
    with load(gguf) as owner:
        client = owner.engine.server.client
        monkeypatch.setenv(URL_VARIABLE, client.url)
        monkeypatch.setenv(KEY_VARIABLE, client.key.reveal())
        with pytest.raises(UnsupportedError, match="are not those of"):
            load(gguf)


APP = """
import signal, sys, time
import polydraft
signal.signal(signal.SIGINT, lambda *_: None)  # an app that finishes its answer first
with polydraft.load(sys.argv[1], backend="llama-server", drafter=sys.argv[2], device="cpu") as session:
    stream = session.stream([2, 3, 4], max_new_tokens=40, ignore_eos=True)
    next(stream)
    print(session.engine.server.client.url, flush=True)
    print(1 + sum(len(chunk.token_ids) for chunk in stream), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def app(gguf, stand_in):
    """An app in the middle of an answer: its process, and a function whether its server listens."""
    stand_in("slow")
    models = [str(gguf("tiny-e2b")), str(gguf("tiny-e2b-assistant"))]
    process = subprocess.Popen(
        [sys.executable, "-c", APP, *models], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    address = urlsplit(process.stdout.readline().strip())

    def listens():
        with contextlib.suppress(OSError), socket.create_connection((address.hostname, address.port), timeout=5):
            return True
        return False

    assert listens()
    yield process, listens
    process.kill()
    process.communicate()


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_does_not_reach_the_server_in_the_middle_of_an_answer(app):
    process, listens = app
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the app and all its children
    assert process.stdout.readline() == "40\n"
    assert listens()


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_a_killed_app_takes_its_server_with_it(app):
    process, listens = app
    process.kill()
    deadline = time.monotonic() + 20
    while listens() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not listens()


def test_a_server_that_dies_says_its_last_words(gguf, stand_in):
    stand_in("good")
    with load(gguf) as session:
        assert session.generate([2, 3, 4], max_new_tokens=10).token_ids
        process = session.engine.server.process
        os.kill(process.pid, signal.SIGKILL)
        process._process.wait()
        with pytest.raises(EngineError, match="llama-server was ended by signal 9"):
            session.generate([2, 3, 4], max_new_tokens=10)


def test_log_probabilities_are_refused(gguf, stand_in):
    stand_in("good")
    with load(gguf) as session, pytest.raises(UnsupportedError, match="logprobs"):
        session.generate([2, 3], logprobs=2)


# --- the real one ----------------------------------------------------------------------------------------------------
@real
@pytest.mark.parametrize(
    ("name", "drafter"),
    [("tiny-e2b", "tiny-e2b-assistant"), ("tiny-26b", "tiny-26b-assistant"), ("tiny-llama", "tiny-llama-draft")],
)
def test_as_the_backend_in_this_process(gguf, name, drafter):
    settings = {"max_new_tokens": 60, "ignore_eos": True}
    with load(gguf, name, drafter) as session:
        served = session.generate(PROMPT, **settings)
        plain = session.generate(PROMPT, **settings, speculate="off")
    with polydraft.load(gguf(name), backend="llama_cpp", drafter=gguf(drafter), device="cpu") as session:
        ours = session.generate(PROMPT, **settings)
    assert served.token_ids == plain.token_ids == ours.token_ids
    assert plain.stats.num_draft_tokens == 0
    assert served.stats.accepted_per_position == ours.stats.accepted_per_position
    assert served.stats.num_drafts == ours.stats.num_drafts


@real
def test_cancelled_soon(gguf):
    with load(gguf) as session:
        stream = session.stream(PROMPT, max_new_tokens=4000, ignore_eos=True)
        next(stream)
        started = time.monotonic()
        stream.close()
        assert session.generate(PROMPT, max_new_tokens=4).token_ids
        assert time.monotonic() - started < 5


@real
def test_a_flag_that_is_unknown(gguf):
    with pytest.raises(InvalidRequestError, match="invalid argument: --no-such-flag"):
        load(gguf, engine_options={"extra_args": ("--no-such-flag",)})


@real
def test_a_running_server(gguf, monkeypatch):
    with load(gguf) as owner:
        wanted = owner.generate(PROMPT, max_new_tokens=20).token_ids
        client = owner.engine.server.client
        monkeypatch.setenv(URL_VARIABLE, client.url)
        monkeypatch.setenv(KEY_VARIABLE, client.key.reveal())
        with load(gguf) as session:
            assert session.generate(PROMPT, max_new_tokens=20).token_ids == wanted
            with pytest.raises(UnsupportedError, match="drafts for every request"):
                session.generate(PROMPT, max_new_tokens=20, speculate="off")
        assert owner.generate(PROMPT, max_new_tokens=20).token_ids == wanted
