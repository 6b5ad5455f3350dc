"""``polydraft serve`` as a process: it serves, stops, and says why it cannot."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import polydraft
import pytest
from polydraft.errors import UnsupportedError
from polydraft_server import run
from polydraft_server.settings import ServerSettings

TOY = ("--model", "builtin:toy", "--backend", "reference")


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "polydraft", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_and_stops(number, code):
    process = start(*TOY, "--port", "0", "-n", "5", POLYDRAFT_API_KEY="sk-canary")
    try:
        said = process.stderr.readline()
        while "Serving" not in said:
            assert said, process.stderr.read()
            said = process.stderr.readline()
        assert "builtin:toy" in said
        url = said.partition(" at ")[2].partition(";")[0]
        request = urllib.request.Request(
            f"{url}/completions",
            json.dumps({"prompt": "Hi"}).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer sk-canary"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 5
        long = {"prompt": "Hi", "max_tokens": 900, "ignore_eos": True, "stream": True, "speculate": "off"}
        request.data = json.dumps(long).encode()
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.readline()
            process.send_signal(number)
            time.sleep(0.3)
            process.send_signal(number)  # it does not wait for the answer
            last = answer.read().strip().rpartition(b"\n")[2]
        assert b"server_stopping" in last or last == b"data: [DONE]"
        while process.poll() is None:  # nor does one more change how it ends
            process.send_signal(number)
            time.sleep(0.005)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        assert "sk-canary" not in out + said + err
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_what_an_engine_does_once_is_done_before_requests_come(monkeypatch):
    asked = []

    class Asked:
        def __init__(self, session):
            self._session, self.running = session, session.running

        def generate(self, prompt, **settings):
            asked.append(settings["speculate"])
            raise UnsupportedError("It has no plain decoding.", "Ask for something else.")

    class Ready:
        def __init__(self, api, listening, started_up):
            assert asked == ["auto", "off"]
            listening.close()

        def run_to_the_end(self):
            return 0

    monkeypatch.setattr(run, "Server", Ready)
    with polydraft.load("builtin:toy", backend="reference") as session:
        monkeypatch.setattr(run, "Api", lambda served, *_: SimpleNamespace(names=["toy"], session=served))
        assert run.serve(lambda: Asked(session), ServerSettings(port=0), lambda _: None) == 0


def test_what_cannot_be_served(command_line, monkeypatch):
    monkeypatch.delenv("POLYDRAFT_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, err = command_line("serve", *TOY, "--port", port)
        assert code == 2
        assert f"cannot listen on 127.0.0.1:{port}" in err
    code, err = command_line("serve", *TOY, "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "POLYDRAFT_API_KEY" in err
    code, err = command_line("serve", "--model", "builtin:nothing", "--backend", "reference", "--port", "0")
    assert code == 1
    assert "no built-in target 'nothing'" in err
    assert "Traceback" not in err


def test_wrong_options(command_line, monkeypatch):
    monkeypatch.delenv("POLYDRAFT_API_KEY", raising=False)
    others = (*TOY, "--host", "0.0.0.0")  # without a key it ends in any case
    for arguments, says in (
        ((*TOY, "--print"), "--own-server"),
        ((*TOY, "--no-auth", "--api-key-file", "x"), "exclude one another"),
        ((*TOY, "--api-key-file", "/no/such/file"), "cannot be read"),
        ((*TOY, "--temperature", "-1"), "--temperature -1"),
        ((*TOY, "--port", "70000"), "--port"),
        ((*others, "--cors-origin", "http://x.com/"), "Give http://x.com."),
        ((*others, "--served-model-name", "a", "--served-model-name", ""), "--served-model-name is empty"),
    ):
        code, err = command_line("serve", *arguments)
        assert code == 2, err
        assert says in err


@pytest.fixture
def command_line(capfd):
    from polydraft._cli.app import run

    def go(*arguments):
        code = run(arguments)
        return code, capfd.readouterr().err

    return go
