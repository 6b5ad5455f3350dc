"""A server as a child process: it outlives an interrupt of the app, and never the app. The server is a small script."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time

import pytest
from polydraft.engine_parts import serving
from polydraft.engine_parts.serving import LOOPBACK, ServerProcess, check_port, free_port
from polydraft.errors import BackendUnavailableError, EngineError, InvalidRequestError, ModelFormatError
from polydraft.secrets import Secret

posix = pytest.mark.skipif(os.name != "posix", reason="process groups and forks")

SERVER = """
import http.server, os, subprocess, sys
port, lock_file, status, ignores = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), len(sys.argv) > 4
if os.name == "posix":  # server and child hold the lock as long as one of them lives
    import fcntl, signal
    lock = open(lock_file, "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], pass_fds=[lock.fileno()])
    if ignores:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(status if self.path == "/health" else 404)
        self.end_headers()

print("listening with", os.environ.get("KEY"), flush=True)
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""

DRIPS = """
import socket, sys, time
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            try:
                while True:
                    connection.sendall(b"H")
                    time.sleep(0.05)
            except OSError:
                pass
"""

APP = """
import os, signal, sys, time
from polydraft.engine_parts.serving import ServerProcess
port = int(sys.argv[1])
server = ServerProcess([sys.executable, "-S", *sys.argv[2:]], name="The server", port=port)
server.wait_until_ready(60)
def wait():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.2)  # an interrupted server would have ended by now
"""


class Server:
    """What runs the script: its command line, and whether it still lives."""

    def __init__(self, folder):
        self.port = free_port()
        self.script, self.lock_file = folder / "server.py", folder / "lock"
        self.script.write_text(SERVER)
        self.lock_file.touch()

    def command(self, *arguments, status=200):
        return [str(self.script), str(self.port), str(self.lock_file), str(status), *arguments]

    def start(self, *arguments, status=200, **named):
        line = [sys.executable, "-S", *self.command(*arguments, status=status)]
        return ServerProcess(line, name="The server", port=self.port, **named)

    def app(self, code):
        """Run an app that starts the server and does what ``code`` says, in a separate process group."""
        line = [sys.executable, "-c", APP + code, str(self.port), *self.command()]
        return subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=os.name == "posix"
        )

    def listens(self):
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port), timeout=5):
            return True
        return False

    def ended(self):
        """Whether the server and its child end within some seconds."""
        return eventually(self.unlocked) and not self.listens()

    def unlocked(self):
        import fcntl

        with self.lock_file.open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def server(tmp_path, logs):
    return Server(tmp_path)


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    """Where the servers' logs are, apps' too."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_server_is_started_awaited_and_stopped(server):
    process = server.start(environment={"KEY": "a key"})
    process.wait_until_ready(60)
    assert process.alive
    assert process.url == f"http://127.0.0.1:{server.port}"
    assert "listening with a key" in process.last_words()
    process.check_alive()
    process.stop()
    process.stop()
    assert not process.alive
    with pytest.raises(EngineError, match="The server was ended by signal 15" if os.name == "posix" else "ended"):
        process.check_alive()
    process.discard_log()
    assert not process.log.parent.exists()
    assert process.last_words() == ""


def test_a_secret_reaches_the_server_and_is_not_shown(server):
    process = server.start(environment={"KEY": Secret("canary-8f31")})
    process.wait_until_ready(60)
    assert "listening with ***" in process.last_words()
    if os.name == "posix":
        assert stat.S_IMODE(process.log.stat().st_mode) == 0o600
        assert stat.S_IMODE(process.log.parent.stat().st_mode) == 0o700
        assert "canary" in process.log.read_text()  # the server's own words, in a file of this user only
    process.kill()
    with pytest.raises(EngineError, match=r"listening with \*\*\*") as caught:
        process.check_alive()
    assert "canary" not in repr(caught.value)


def test_a_health_check_that_drips(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "_HEALTH_TIMEOUT", 0.2)
    script = tmp_path / "drips.py"
    script.write_text(DRIPS)
    port = free_port()
    process = ServerProcess([sys.executable, "-S", str(script), str(port)], name="The server", port=port)
    started = time.monotonic()
    with pytest.raises(EngineError, match="was not ready within 1 seconds"):
        process.wait_until_ready(1)
    assert time.monotonic() - started < 10


@posix
def test_only_its_user_can_read_the_log(server):
    process = server.start()
    try:
        assert stat.S_IMODE(process.log.stat().st_mode) == 0o600
        assert stat.S_IMODE(process.log.parent.stat().st_mode) == 0o700
    finally:
        process.kill()


@posix
def test_stopping_ends_the_servers_children_too(server):
    process = server.start()
    process.wait_until_ready(60)
    process.stop()
    assert server.ended()


@posix
def test_a_server_that_ignores_the_request_to_end_is_killed(server, monkeypatch):
    monkeypatch.setattr(serving, "_GRACE", 0.1)
    process = server.start("ignores")
    process.wait_until_ready(60)
    process.stop()
    assert server.ended()


@posix
def test_an_object_that_is_deleted_takes_its_server_and_log_with_it(server):
    process = server.start()
    process.wait_until_ready(60)
    folder = process.log.parent
    del process
    assert server.ended()
    assert not folder.exists()


@posix
def test_ctrl_c_in_the_app_does_not_reach_the_server(server):
    app = server.app("wait(); server.check_alive(); print('alive', flush=True); server.stop()")
    assert app.stdout.readline() == "ready\n"
    os.killpg(app.pid, signal.SIGINT)  # as a terminal does
    output, errors = app.communicate(timeout=60)
    assert output == "alive\n", errors
    assert server.ended()


@posix
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)", ""])
def test_a_server_ends_with_the_app_however_that_ends(server, logs, end):
    app = server.app(end)
    _, errors = app.communicate(timeout=60)
    assert not errors
    assert server.ended()
    assert eventually(lambda: not list(logs.iterdir()))


@posix
def test_a_forked_child_neither_ends_the_server_nor_keeps_it(server):
    """The child of the app tries to end the server, and lives on when the app is killed."""
    app = server.app(
        "if os.fork() == 0:\n"
        "    server.stop(); server.kill(); server.discard_log()\n"
        "    print('tried', flush=True)\n"
        "    os.close(1); os.close(2)\n"
        "    time.sleep(60)\n"
        "time.sleep(60)"
    )
    assert app.stdout.readline() == "tried\n"
    assert server.listens()
    app.kill()
    assert server.ended()
    os.killpg(app.pid, signal.SIGKILL)
    app.communicate()


def test_a_server_that_dies_at_its_start(server):
    def failure(code, log):
        return ModelFormatError(f"code {code}: {log.strip()}", "Change the file.")

    line = [sys.executable, "-S", "-c", "print('no such layer'); raise SystemExit(3)"]
    with pytest.raises(ModelFormatError, match="code 3: no such layer"):
        ServerProcess(line, name="The server", port=server.port).wait_until_ready(60, failure=failure)
    with pytest.raises(EngineError, match=r"The server ended with code 3 before it was ready. no such layer"):
        ServerProcess(line, name="The server", port=server.port).wait_until_ready(60)


def test_a_server_that_is_not_ready_in_time_is_stopped_and_its_log_kept(server):
    process = server.start(status=503)
    with pytest.raises(EngineError, match=r"not ready within 0\.5 seconds") as caught:
        process.wait_until_ready(0.5)
    assert not process.alive
    log = process.log
    assert str(log) in caught.value.hint
    del process, caught
    assert log.exists()


def test_a_program_that_does_not_exist(tmp_path):
    with pytest.raises(BackendUnavailableError, match="The server cannot be started"):
        ServerProcess([str(tmp_path / "none")], name="The server", port=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("no IPv6 here")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequestError, match="cannot listen") as caught:
            check_port(host, port)
    assert caught.value.argument == "port"
    check_port(host, port)


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
def test_an_address_of_another_machine(host):
    with pytest.raises(InvalidRequestError, match=f"cannot listen on {host}"):
        check_port(host, free_port())
