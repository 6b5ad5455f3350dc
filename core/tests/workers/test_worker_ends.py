"""How workers end: killed, crashed, with their app, and not by its Ctrl+C."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from polydraft._load import open_session
from polydraft._workers.backend import WorkerBackend
from polydraft._workers.crashes import Death
from polydraft._workers.messages import PROTOCOL_VERSION, Hello, frame
from polydraft.errors import (
    BackendUnavailableError,
    EngineCrashedError,
    EngineError,
    SessionClosedError,
    SystemResourceError,
    UnsupportedError,
)
from worker_helpers import RECORD, alive, scripted_request, wait_until

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks")
TESTS = Path(__file__).parents[1]

ELSEWHERE = """
import sys
sys.path[:] = PATH
from polydraft._load import open_session
from polydraft._workers.backend import WorkerBackend
from worker_helpers import RECORD, scripted_request
backend = WorkerBackend(RECORD)
with open_session(backend, scripted_request(backend)) as session:
    print(session.running.process)
"""
"""An app whose Python would not find polydraft by itself, such as one that was built into a folder or an archive."""

APP = """
import os, signal, sys, threading, time
sys.path.insert(0, TESTS)
from polydraft._load import open_session
from polydraft._workers.backend import WorkerBackend
from worker_helpers import RECORD, scripted_request
backend = WorkerBackend(RECORD)
sessions = []
# In a thread that ends: the worker must not end with it.
thread = threading.Thread(target=lambda: sessions.append(open_session(backend, scripted_request(backend))))
thread.start(); thread.join()
session = sessions[0]
"""


def run_app(body, **options):
    code = APP.replace("TESTS", repr(str(TESTS))) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def test_a_worker_imports_from_where_its_app_does(tmp_path):
    for name in ("runpy", "pkgutil", "polydraft"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    code = ELSEWHERE.replace("PATH", repr([str(TESTS), *filter(None, sys.path)]))
    base = getattr(sys, "_base_executable", sys.executable)  # a virtual environment's has no polydraft
    done = subprocess.run([base, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.returncode) == ("worker\n", 0), done.stderr


def test_a_program_without_a_python_starts_no_worker(monkeypatch):
    """A frozen app would start itself again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(BackendUnavailableError, match="no Python to start one with") as refused:
        WorkerBackend(RECORD)
    assert "set_executable" in refused.value.hint


@pytest.mark.parametrize("name", ["polydraft-worker-scripted", "polydraft-worker-errors", "polydraft-worker-writer"])
def test_a_worker_for_which_no_thread_can_be_started(backend, name, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    request = scripted_request(backend)
    backend.release()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(SystemResourceError, match="cannot be started: the system has no resources left"):
        backend.load_engine(request)


@posix
@pytest.mark.parametrize(
    ("prompt", "name", "words"),
    [("h", "SIGKILL", ""), ("i", "SIGABRT", "free(): invalid pointer"), ("j", "SIGSEGV", ""), ("k", "", "")],
)
def test_a_worker_that_dies_is_a_typed_error_and_no_other_session_is_concerned(load, session, prompt, name, words):
    dying = load()
    with pytest.raises(EngineCrashedError) as caught:
        dying.generate(prompt)
    error = caught.value
    assert isinstance(error, EngineError)
    assert (error.signal, error.exit_code) == (name, None if name else 7)
    assert (name or "exit code 7") in error.message
    assert f"process {dying.running.process_id}" in error.message
    assert words in error.last_words
    assert "Extension modules" not in str(error)
    assert error.partial_text == "bcbc"
    assert "polydraft.load" in error.hint
    assert session.generate("a", max_new_tokens=3).text == "bbb"
    with pytest.raises(EngineCrashedError):
        dying.generate("a")
    dying.close()
    assert load().generate("a", max_new_tokens=3).text == "bbb"


@posix
def test_all_calls_of_a_worker_learn_of_its_end(load):
    worker = load()
    errors = []

    def call():
        try:
            worker.generate("b")
        except EngineCrashedError as error:
            errors.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    os.kill(worker.running.process_id, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    assert len(errors) == len({*map(id, errors)}) == 3


@posix
@pytest.mark.parametrize("end", ["SIGKILL", "exit"])
def test_a_worker_that_dies_while_it_loads(backend, end):
    with pytest.raises(EngineCrashedError, match="while it loaded letters"):
        open_session(backend, scripted_request(backend, at_load=end))


def test_a_load_that_is_refused_leaves_no_worker(backend):
    pid = int(backend.diagnose().engine_version.rpartition(" ")[2])
    with pytest.raises(UnsupportedError, match="cannot load this"):
        open_session(backend, scripted_request(backend, at_load="refuses"))
    assert wait_until(lambda: not alive(pid))


@posix
def test_an_interrupted_load_leaves_no_worker(backend):
    pid = int(backend.diagnose().engine_version.rpartition(" ")[2])
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        open_session(backend, scripted_request(backend, at_load="waits"))
    assert wait_until(lambda: not alive(pid))


@posix
def test_an_interrupted_call_leaves_the_session_usable(session):
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        session.generate("b")
    assert session.generate("a", max_new_tokens=3).text == "bbb"


@posix
def test_a_worker_that_does_not_read_keeps_nobody_waiting(load):
    worker = load()
    pid = worker.running.process_id
    # Before it stops, as it is asked about the settings.
    streams = [worker.stream([0] * 100_000, max_new_tokens=3) for _ in range(3)]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for stream in streams:
            thread = threading.Thread(target=lambda stream=stream: list(stream), daemon=True)
            thread.start()
            time.sleep(0.02)
            stream.cancel()
            thread.join(10)
            assert stream.result.finish_reason == "cancelled"
        assert time.monotonic() - began < 5, "a full pipe holds up a cancellation"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert worker.generate("a", max_new_tokens=3).text == "bbb"


@posix
@pytest.mark.parametrize("how", ["exit", "fork"])
def test_the_end_of_the_app_is_the_end_of_its_workers(how):
    body = {
        "exit": "sys.exit(0)",
        # Killed, and a forked child that lives on holds no pipe of the worker.
        "fork": """
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    }[how]
    app = run_app(
        "print(session.running.process_id, session.generate('a', max_new_tokens=2).text, flush=True)\n"
        + textwrap.dedent(body)
    )
    try:
        pid, text = app.stdout.readline().split()
        assert text == "bb"
        assert app.wait(20) == (0 if how == "exit" else -signal.SIGKILL)
        assert wait_until(lambda: not alive(int(pid)))
    finally:
        os.killpg(app.pid, signal.SIGKILL) if how == "fork" else app.kill()
        app.stdout.close()


@posix
def test_ctrl_c_reaches_no_worker():
    app = run_app("""
        try:
            print(session.running.process_id, flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print(session.generate('a', max_new_tokens=2).text, flush=True)
            session.close()
    """)
    try:
        pid = int(app.stdout.readline())
        time.sleep(0.1)
        os.killpg(app.pid, signal.SIGINT)  # as a terminal does
        assert app.stdout.readline() == "bb\n"
        assert app.wait(20) == 0
        assert not alive(pid)
    finally:
        app.kill()
        app.stdout.close()


@posix
def test_a_forked_child_does_the_worker_no_harm(session):
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            session.generate("a")
        except BaseException as error:
            session.close()
            os._exit(type(error).__name__ == "ForkedSessionError")
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert session.generate("a", max_new_tokens=3).text == "bbb"


def test_after_close_a_session_says_so(load):
    worker = load()
    worker.close()
    worker.close()
    with pytest.raises(SessionClosedError):
        worker.generate("a")


@posix
def test_a_close_that_hangs_ends_all_the_same(load, monkeypatch):
    monkeypatch.setenv("CLOSES", "hangs")
    monkeypatch.setattr("polydraft._workers.process._GRACE", 0.3)
    worker = load()
    pid = worker.running.process_id
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 10
    assert wait_until(lambda: not alive(pid))


@posix
def test_a_session_that_is_dropped_leaves_no_worker(backend):
    worker = open_session(backend, scripted_request(backend))
    pid = worker.running.process_id
    assert worker.generate("a", max_new_tokens=2).text == "bb"
    del worker
    gc.collect()
    assert wait_until(lambda: not alive(pid))


def other_python(folder, body):
    """A program in place of an environment's Python."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n")
    path.chmod(0o755)
    return path


@posix
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.close(1); import time; time.sleep(600)", "closed its pipe"),
        (f"os.write(1, {frame(Hello(protocol=PROTOCOL_VERSION, polydraft='0.1'))!r})", "records are not those"),
        (f"os.write(1, {frame(Hello(protocol=99, polydraft='9.0'))!r})", "polydraft 9.0, which speaks version 99"),
        ('sys.exit("/usr/bin/python: No module named polydraft._workers")', "has no polydraft that can be a worker"),
        ("os.write(1, b'Welcome to this Python!\\n')", "wrote what is no message"),
    ],
)
def test_another_version_names_the_command_that_mends_it(tmp_path, body, message):
    python = other_python(tmp_path, body)
    backend = WorkerBackend(RECORD, python, mend="polydraft engines update scripted")
    with pytest.raises(BackendUnavailableError, match=message) as caught:
        backend.capabilities()
    assert "`polydraft engines update scripted`" in caught.value.hint


def test_a_python_that_has_gone(tmp_path):
    backend = WorkerBackend(RECORD, tmp_path / "gone", mend="polydraft engines update scripted")
    with pytest.raises(BackendUnavailableError, match="cannot be started") as caught:
        backend.capabilities()
    assert "`polydraft engines update scripted`" in caught.value.hint


@pytest.mark.parametrize(
    ("kills", "known", "message", "hint"),
    [
        (1, True, "because memory ran out", "smaller `context_length`"),
        (0, False, "was ended by SIGKILL", "polydraft.load"),
        (None, None, "was ended by SIGKILL", "memory has probably run out"),
    ],
)
def test_memory_that_ran_out_is_told_as_far_as_it_is_known(kills, known, message, hint):
    error = Death("The worker", -9, "", kills).error()
    assert error.out_of_memory is known
    assert message in error.message
    assert hint in error.hint
