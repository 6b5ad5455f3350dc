"""``polydraft serve``: a program of the test stands for the engine's server."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from polydraft._cli.app import run
from polydraft._registry.resolver import Resolver
from polydraft.contract import ServerCommand

SERVES = """
import sys
from types import SimpleNamespace
from polydraft._cli.app import main
from polydraft.contract import ServerCommand
from polydraft._registry.resolver import Resolver

program = "import os, sys, time; print(os.getpid(), os.environ['SAID'], flush=True); " + sys.argv.pop(1)
command = ServerCommand(arguments=(sys.executable, "-c", program), environment={"SAID": "a b"})
backend = SimpleNamespace(server_command=lambda request, host, port: command)
request = SimpleNamespace(plan=SimpleNamespace(kind=None), engine_options=None)
Resolver.prepare = lambda self, *names, **arguments: SimpleNamespace(backend=backend, request=request)
sys.argv[0] = "polydraft"
main()
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


def start(program):
    line = [sys.executable, "-c", SERVES, program, "serve", "--own-server", "-m", "x", "--port", free_port()]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_exit_code_is_the_servers():
    output, told = start("sys.exit(7)").communicate(timeout=60)
    assert output.split(maxsplit=1)[1] == "a b\n"
    assert told.startswith("SAID='a b' ")
    process = start("sys.exit(7)")
    process.communicate(timeout=60)
    assert process.returncode == 7


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_server_too(number):
    process = start("time.sleep(600)")
    server = int(process.stdout.readline().split()[0])
    process.send_signal(number)
    process.wait(60)
    process.communicate()
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.1", "no.such.host.invalid"])
def test_an_address_that_cannot_be_used(host, monkeypatch, capfd):
    """Said before the server loads anything."""
    backend = SimpleNamespace(server_command=lambda request, host, port: ServerCommand(arguments=("no-such-program",)))
    request = SimpleNamespace(plan=SimpleNamespace(kind=None), engine_options=None)
    prepared = SimpleNamespace(backend=backend, request=request)
    monkeypatch.setattr(Resolver, "prepare", lambda self, *names, **arguments: prepared)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", "--own-server", "-m", "x", "--host", host, "--port", port]) != 0
        assert f"cannot listen on {host}:{port}" in capfd.readouterr().err
        assert run(["serve", "--own-server", "-m", "x", "--host", host, "--port", port, "--print"]) == 0


def test_without_the_server_it_says_how_to_install_it(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "polydraft_server", None)
    assert run(["serve", "-m", "x"]) == 1
    error, hint = capfd.readouterr().err.splitlines()
    assert error == "Error: The server is not installed: there is no module polydraft_server."
    assert hint.startswith("Hint: Install it: `pip install 'polydraft[server]'`.")
    assert run(["batch", "in.jsonl", "out.jsonl", "-m", "x"]) == 1
    error, hint = capfd.readouterr().err.splitlines()
    assert "Batches need polydraft's server" in error
    assert hint == "Hint: Install it: `pip install 'polydraft[server]'`."


@pytest.mark.parametrize("turn", ["first", "second"])
def test_the_next_test_has_its_own_output(turn, capfd):
    """What a command has claimed in this process belongs to no later test: the fixture in the repository's conftest."""
    assert run(["cache", "--json"]) == 0
    assert capfd.readouterr().out.count('"name": "verified"') == 1
