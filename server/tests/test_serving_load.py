"""Many clients at once: turns, limits, clients that leave or do not read, an engine that is killed, and the stop."""

import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import polydraft
import pytest
from polydraft_server.settings import ServerSettings
from scripted import Script
from serving import answer_of, eventually, serving


def many(calls):
    """The answers of calls made at the same time."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(60) for future in [threads.submit(call) for call in calls]]


@pytest.mark.parametrize(("concurrency", "most"), [("serial", 1), ("concurrent", 3)])
def test_as_many_at_once_as_the_engine_takes(scripted, concurrency, most):
    script = Script(pace=0.002)
    with scripted(script, concurrency, max_running=3) as server:
        texts = [f"prompt {i}" for i in range(9)]
        done = many([lambda text=text: server.complete(text, max_tokens=10) for text in texts])
        assert [answer.json["choices"][0]["text"] for answer in done] == ["abcdefghij"] * 9
        assert script.most == most
        assert sorted(script.prompts) == texts


@pytest.mark.parametrize(("shared", "most"), [(1, 4), (16, 16)])
def test_as_many_at_once_as_share_their_steps(shared, most):
    session = SimpleNamespace(
        running=SimpleNamespace(concurrency="concurrent"), engine=SimpleNamespace(shared_sequences=shared)
    )
    assert ServerSettings().running_at_once(session) == most


@pytest.mark.parametrize(
    ("concurrency", "given", "told"), [("serial", 3, True), ("serial", 1, False), ("concurrent", 3, False)]
)
def test_more_at_once_than_the_engine_takes_is_told(concurrency, given, told):
    session = SimpleNamespace(running=SimpleNamespace(concurrency=concurrency, backend="one"))
    said = ServerSettings(max_running=given).note(session)
    assert said == ("max_running=3 has no effect: one runs one generation at a time." if told else "")


def test_the_queue_is_bounded(scripted):
    script = Script(pace=0.01)
    with scripted(script, max_waiting=2) as server, ThreadPoolExecutor(3) as threads:
        first = [threads.submit(server.complete, "x", max_tokens=40) for _ in range(3)]
        eventually(lambda: server.api.admission.waiting == 2)
        assert server.metric("vllm:num_requests_waiting") == 2
        assert server.metric("vllm:num_requests_running") == 1
        done = server.complete("too many", max_tokens=1)
        assert (done.status, done.error["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(done.headers["retry-after"]) <= 60
        assert server.complete("never", n=4).status == 400
        assert {future.result(60).status for future in first} == {200}
        assert server.complete("now", max_tokens=1).status == 200
    assert "too many" not in script.prompts


def test_clients_take_turns(scripted):
    """One client's many requests do not keep another's single one waiting."""
    script = Script(pace=0.005)
    with scripted(script) as server, ThreadPoolExecutor(8) as threads:
        calls = []
        for at, user in enumerate(["greedy"] * 6 + ["modest"]):
            calls.append(threads.submit(server.complete, f"{user} {at}", max_tokens=20, user=user))
            eventually(lambda count=at: server.api.admission.waiting + len(script.prompts) == count + 1)
        assert {call.result(60).status for call in calls} == {200}
    assert script.prompts.index("modest 6") <= 2


def start(server, stream, **fields):
    """Send a request, and return its connection without reading the answer."""
    connection = server.connect()
    body = {"prompt": "x", "max_tokens": 10_000, "stream": stream, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "half"])
def test_a_client_that_leaves_cancels_at_once(scripted, stream, how):
    script = Script(pace=0.01)
    with scripted(script, request_seconds=30) as server:
        for _ in range(3):
            before = script.cancelled
            connection = start(server, stream)
            eventually(lambda: script.working == 1)
            time.sleep(0.05)
            if how == "half":
                connection.sock.shutdown(socket.SHUT_WR)
            else:
                connection.sock.close()
            left = time.monotonic()
            eventually(lambda: script.working == 0)
            assert time.monotonic() - left < 1
            assert script.cancelled == before + 1
            connection.close()
        eventually(lambda: not server.api._runs)
        assert server.metric("polydraft:requests_cancelled_total") == 3
        assert server.complete("again", max_tokens=3).status == 200


def test_a_client_that_leaves_the_queue(scripted):
    script = Script(pace=0.01)
    with scripted(script) as server:
        holding = start(server, stream=True)
        eventually(lambda: script.working == 1)
        waiting = start(server, stream=False, prompt="gone")
        eventually(lambda: server.api.admission.waiting == 1)
        waiting.sock.close()
        eventually(lambda: server.api.admission.waiting == 0)
        holding.sock.close()
        eventually(lambda: script.working == 0)
        assert server.complete("next", max_tokens=2).status == 200
    assert "gone" not in script.prompts


def test_a_slow_reader_holds_nobody_back(scripted):
    """On an engine that runs one at a time: it writes on, and the next has its turn."""
    script = Script(text="x" * 800)
    with scripted(script, write_seconds=1.5) as server:
        # Else the system would take the whole answer for the client.
        server.server._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"prompt": "slow", "max_tokens": 800, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        eventually(lambda: "slow" in script.prompts)
        assert server.complete("quick", max_tokens=3).status == 200
        assert server.api._runs
        eventually(lambda: not server.api._runs)  # it is disconnected, since it does not read
        eventually(lambda: not server.server.server_state.connections)
        assert server.metric("polydraft:requests_cancelled_total") == 1
        slow.close()


def test_time_limits(scripted):
    script = Script(pace=0.02)
    with scripted(script, request_seconds=0.3, read_seconds=0.3) as server:
        done = server.complete(max_tokens=1000)
        assert (done.status, done.error["code"]) == (408, "timeout")
        assert done.headers["x-should-retry"] == "false"
        events = server.complete(max_tokens=1000, stream=True).events
        assert events[-1]["error"]["code"] == "timeout"
        assert "".join(choice["text"] for event in events[:-1] for choice in event["choices"])
        eventually(lambda: script.working == 0)
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(4096)
        assert server.complete(max_tokens=2).status == 200


def test_a_long_wait_for_the_first_token(scripted, monkeypatch):
    """A stream begins without it, and shows signs of life; an error is then an event."""
    monkeypatch.setattr("polydraft_server.app._FIRST_EVENT_WITHIN", 0.05)
    monkeypatch.setattr("polydraft_server.app._PING_EVERY", 0.1)
    script = Script(pace=0.5)
    with scripted(script, request_seconds=10) as server:
        done = server.complete(max_tokens=2, stream=True)
        assert b": ping" in done.body
        assert "".join(choice["text"] for event in done.events for choice in event["choices"]) == "ab"


def test_a_graceful_stop(scripted):
    """What can end in time does; the rest is told, and so is who comes too late."""
    script = Script(pace=0.01)
    with scripted(script, "concurrent", max_running=2, stop_seconds=1.0) as server, ThreadPoolExecutor(4) as threads:
        short = threads.submit(server.complete, "short", max_tokens=30)
        long = threads.submit(server.complete, "long", max_tokens=5000, stream=True)
        eventually(lambda: script.working == 2)
        waiting = threads.submit(server.complete, "waits", max_tokens=1)
        eventually(lambda: server.api.admission.waiting == 1)
        late = server.connect()
        late.connect()
        began = time.monotonic()
        server.server.should_exit = True
        assert waiting.result(10).error["code"] == "server_stopping"
        late.request("GET", "/ready")
        assert answer_of(late).status == server.get("/ready").status == 503
        refused = server.complete("late")
        assert (refused.status, refused.error["code"]) == (503, "server_stopping")
        assert not long.done()
        assert short.result(10).json["choices"][0]["finish_reason"] == "length"
        assert long.result(10).events[-1]["error"]["code"] == "server_stopping"
        assert time.monotonic() - began < 5
        late.close()


def test_a_killed_engine_is_loaded_again():
    load = {"backend": "reference", "isolation": "process"}

    def again():
        return polydraft.load("builtin:toy", **load)

    with serving(again(), load=again) as server:
        expected = server.complete(max_tokens=5).json["choices"]
        running = server.api.served.running
        os.kill(running.process_id, signal.SIGKILL)
        done = server.complete(max_tokens=5)
        while done.status == 200:  # the pipe may be read before the death is noticed
            done = server.complete(max_tokens=5)
        assert done.status == 503
        assert done.error["code"] in ("engine_crashed", "engine_loading")
        assert "retry-after" in done.headers
        eventually(lambda: server.get("/ready").status == 200)
        assert server.complete(max_tokens=5).json["choices"][0]["text"] == expected[0]["text"]
        assert server.api.served.running.process_id != running.process_id


def test_nothing_is_lost_or_doubled(toy):
    """A short version of ``server/long_tests/load.py``."""
    server, _ = toy
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[1] / "long_tests/load.py"
    spec = importlib.util.spec_from_file_location("load", path)
    load = sys.modules["load"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    report = load.run(server.url, clients=16, seconds=6, seed=1)
    assert report.wrong == []
    assert report.right > 20
    assert report.cancelled > 0
    eventually(lambda: not server.api._runs)
    admission = server.api.admission
    assert (admission.running, admission.waiting, admission._admitted) == (0, 0, 0)
    assert threading.active_count() < 200


def test_keep_alive(toy):
    server, _ = toy
    connection = server.connect()
    for _ in range(3):
        connection.request("GET", "/health")
        assert answer_of(connection).status == 200
    connection.close()
