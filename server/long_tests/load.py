"""Many clients of a server for some minutes, some of them badly behaved: is every answer right, or a clear error?

``python server/long_tests/load.py [URL] --clients 64 --seconds 300`` loads a server that runs; without a URL it starts
one of ``builtin:toy`` in a worker process, kills the worker in the middle, and reports the memory of both.

Each client picks what it does next: whole answers and streams whose text is known, cancelled streams, slow reading,
bad input. Right is an answer equal to the first one to the same request, or a typed error; everything else is wrong. At
the end each request has had exactly one outcome, the server works on nothing, and it has counted what was answered.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROMPTS = [f"Once upon a time number {number}," for number in range(8)]
BAD = [b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "x", "temperature": -1}', b'{"prompt": "x", "model": "none"}']
RETRIABLE = {429, 503}


@dataclass
class Report:
    """What came of a run."""

    sent: int = 0
    right: int = 0
    cancelled: int = 0
    refused: int = 0
    retried: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """By status (that of a stream that had begun is 200), type and code."""
    wrong: list[str] = field(default_factory=list)

    def lines(self, seconds: float) -> list[str]:
        """What to print."""
        return [
            f"{self.sent} requests: {self.right} right, {self.cancelled} cancelled, {self.refused} refused, "
            f"{self.retried} told to try again; {self.tokens / seconds:.0f} tokens/s",
            *(f"  {count} times {error}" for error, count in sorted(self.errors.items())),
            *(f"wrong: {what}" for what in self.wrong[:20]),
        ]


class Clients:
    """The clients of one run.

    Args:
        url: The server's, with or without ``/v1``.
        key: Its key; empty: none.
        seed: What the clients draw.
        lenient: Whether a stream may end with an error of the server: while its engine is killed.
    """

    def __init__(self, url: str, key: str, seed: int, *, lenient: bool) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = (parts.hostname, parts.port or 80)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._seed = seed
        self._lenient = lenient
        self._known: dict[str, str] = {}
        self._ids: set[str] = set()
        self._lock = threading.Lock()
        self.report = Report()

    def run(self, clients: int, seconds: float) -> Report:
        """Run so many clients for so long."""
        self._before = self._metric("request_success_total")
        deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(number, deadline)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
            if thread.is_alive():
                self._wrong("a client hangs")
        report = self.report
        outcomes = report.right + report.cancelled + report.refused + report.retried + len(report.wrong)
        if report.sent != outcomes:
            self._wrong(f"{report.sent} requests had {outcomes} outcomes")
        self._check_server()
        return report

    def _check_server(self) -> None:
        """Whether the server has ended all generations, and counted those whose answers came."""
        deadline = time.monotonic() + 20
        while (busy := self._metric("num_requests_running") + self._metric("num_requests_waiting")) > 0:
            if time.monotonic() > deadline:
                self._wrong(f"the server is still at work on {busy:.0f} generations")
                return
            time.sleep(0.2)
        # A client that left may have done so at the very end.
        ended, right = self._metric("request_success_total"), self.report.right
        if not right <= ended - self._before <= right + self.report.cancelled:
            self._wrong(f"the server counted {ended - self._before:.0f} generations, and {right} answers came")

    def _metric(self, name: str) -> float:
        connection = http.client.HTTPConnection(*self._address, timeout=30)
        connection.request("GET", "/metrics", headers=self._headers)
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def _client(self, number: int, deadline: float) -> None:
        draw = random.Random(self._seed * 1000 + number)
        while time.monotonic() < deadline:
            self._count("sent")
            kind = draw.choices([self._whole, self._stream, self._cancel, self._slow, self._bad], [5, 5, 3, 1, 2])[0]
            try:
                kind(draw)
            except Exception as error:
                self._wrong(f"{kind.__name__}: {type(error).__name__}: {error}")
                time.sleep(0.1)

    def _wrong(self, what: str) -> None:
        with self._lock:
            self.report.wrong.append(what)

    def _count(self, name: str, more: int = 1) -> None:
        with self._lock:
            setattr(self.report, name, getattr(self.report, name) + more)

    def _request(self, draw: random.Random) -> dict[str, Any]:
        return {
            "prompt": draw.choice(PROMPTS),
            "max_tokens": draw.choice([1, 8, 32]),
            "ignore_eos": True,
            "speculate": draw.choice(["auto", "off"]),
            **draw.choice([{}, {"temperature": 0.8, "seed": draw.randint(0, 3)}]),
        }

    def _send(self, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(*self._address, timeout=120)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/completions", raw, self._headers)
        return connection, connection.getresponse()

    def _check(self, asked: dict[str, Any], answer_id: str, text: str) -> None:
        if answer_id in self._ids:
            self._wrong(f"{answer_id} came twice")
            return
        self._ids.add(answer_id)
        # The text is the same with and without speculation.
        key = json.dumps({name: value for name, value in asked.items() if name not in ("speculate", "stream")})
        with self._lock:
            first = self._known.setdefault(key, text)
            if first == text:
                self.report.right += 1
                self.report.tokens += asked["max_tokens"]
            else:
                self.report.wrong.append(f"{key}: {text!r} is not {first!r}")

    def _told(self, status: int, body: bytes) -> None:
        """An error: a typed one that may be tried again, or a wrong one."""
        error = self._error(status, json.loads(body))
        if status in RETRIABLE and error["message"]:
            self._count("retried")
            time.sleep(0.05)
        else:
            self._wrong(f"{status}: {error}")

    def _error(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        error: dict[str, Any] = body["error"]
        with self._lock:
            self.report.errors[f"{status} {error['type']} {error['code']}"] += 1
        return error

    def _whole(self, draw: random.Random) -> None:
        asked = self._request(draw)
        connection, response = self._send(asked)
        body = response.read()
        connection.close()
        if response.status == 200:
            answer = json.loads(body)
            self._check(asked, answer["id"], answer["choices"][0]["text"])
        else:
            self._told(response.status, body)

    def _stream(self, draw: random.Random, pause: float = 0.0) -> None:
        asked = {**self._request(draw), "stream": True}
        connection, response = self._send(asked)
        if response.status != 200:
            self._told(response.status, response.read())
            connection.close()
            return
        text, answer_id, done = "", "", False
        for line in response:
            time.sleep(pause)
            if line == b"data: [DONE]\n":
                done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    error = self._error(response.status, event)
                    if self._lenient and error["code"] in ("engine_crashed", "engine_loading"):
                        self._count("retried")
                    else:
                        self._wrong(f"in a stream: {event}")
                    break
                answer_id = event["id"]
                text += event["choices"][0]["text"]
        else:
            if done:
                self._check(asked, answer_id, text)
            else:
                self._wrong("a stream ended without an end")
        connection.close()

    def _slow(self, draw: random.Random) -> None:
        self._stream(draw, pause=0.02)

    def _cancel(self, draw: random.Random) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=120)
        asked = {**self._request(draw), "stream": draw.random() < 0.8, "max_tokens": 2000}
        connection.request("POST", "/v1/completions", json.dumps(asked), self._headers)
        if asked["stream"]:
            connection.getresponse().read(draw.choice([1, 200]))
        else:
            time.sleep(draw.choice([0.0, 0.05]))
        connection.close()
        self._count("cancelled")

    def _bad(self, draw: random.Random) -> None:
        connection, response = self._send(draw.choice(BAD))
        body = response.read()
        connection.close()
        error = self._error(response.status, json.loads(body))
        if response.status in (400, 404) and error["message"]:
            self._count("refused")
        elif self._lenient and response.status in RETRIABLE:
            self._count("retried")
        else:
            self._wrong(f"bad input: {response.status} {body[:200]!r}")


def run(url: str, clients: int, seconds: float, seed: int = 0, *, key: str = "", lenient: bool = False) -> Report:
    """Load a server."""
    return Clients(url, key, seed, lenient=lenient).run(clients, seconds)


def memory(pid: int) -> float:
    """Resident memory of a process, MiB."""
    found = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    return int(found[1]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(one) for path in lists for one in path.read_text(encoding="ascii").split()]


def memory_of(server: int) -> str:
    """That of a server and of its engine."""
    return " + ".join(f"{memory(pid):.0f}" for pid in (server, *engines(server)))


def engines(server: int) -> list[int]:
    """The processes of its engine."""
    return [one for one in children(server) if b"polydraft" in Path(f"/proc/{one}/cmdline").read_bytes()]


def kill(server: int) -> None:
    """Kill its engine."""
    for one in engines(server):
        os.kill(one, signal.SIGKILL)


def own(clients: int, seconds: float) -> Report:
    """Load a server of the toy whose engine is killed in the middle."""
    line = [sys.executable, "-m", "polydraft", "serve", "--model", "builtin:toy", "--backend", "reference"]
    server = subprocess.Popen(
        [*line, "--isolation", "process", "--port", "0"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stderr is not None
    try:
        said = ""
        while "Serving" not in said:
            said = server.stderr.readline()
            if not said:
                sys.exit("the server did not start")
        url = said.partition(" at ")[2].partition(";")[0]
        log = threading.Thread(target=server.stderr.read, daemon=True)
        log.start()
        memories: list[str] = []

        def look() -> None:
            memories.append(memory_of(server.pid))

        look()
        timers = [threading.Timer(seconds / 2, kill, (server.pid,))]
        timers += [threading.Timer(share * seconds, look) for share in (0.15, 0.45, 0.95)]
        for timer in timers:
            timer.start()
        report = run(url, clients, seconds, lenient=True)
        look()
        print(
            "MiB of the server + its engine: at rest; after 15%, 45% and 95% of the time; at rest:", "; ".join(memories)
        )
        return report
    finally:
        server.terminate()
        print("exit code of the server:", server.wait(60))


def main() -> None:
    """Run, print, and fail if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--key-file", type=Path)
    given = parser.parse_args()
    key = given.key_file.read_text(encoding="ascii").strip() if given.key_file else ""
    report = run(given.url, given.clients, given.seconds, key=key) if given.url else own(given.clients, given.seconds)
    print(*report.lines(given.seconds), sep="\n")
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
