"""Many clients of a server for some minutes, some of them badly behaved: is every answer right, or a clear error?

``python server/benchmarks/load.py [URL] --clients 64 --seconds 300`` loads a server that runs; without a URL it starts
one of ``builtin:toy`` in a worker process, kills the worker in the middle, and reports the memory of both.

Each client picks what it does next: whole answers and streams whose text is known, cancelled streams, slow reading,
bad input. Right is an answer equal to the first one to the same request, or a typed error; everything else is wrong.
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

    right: int = 0
    cancelled: int = 0
    refused: int = 0
    retried: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


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
        self._lock = threading.Lock()
        self.report = Report()

    def run(self, clients: int, seconds: float) -> Report:
        """Run so many clients for so long."""
        deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(number, deadline)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
            if thread.is_alive():
                self._wrong("a client hangs")
        return self.report

    def _client(self, number: int, deadline: float) -> None:
        draw = random.Random(self._seed * 1000 + number)
        while time.monotonic() < deadline:
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

    def _check(self, asked: dict[str, Any], text: str) -> None:
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
        error = json.loads(body)["error"]
        if status in RETRIABLE and error["message"]:
            self._count("retried")
            time.sleep(0.05)
        else:
            self._wrong(f"{status}: {error}")

    def _whole(self, draw: random.Random) -> None:
        asked = self._request(draw)
        connection, response = self._send(asked)
        body = response.read()
        connection.close()
        if response.status == 200:
            self._check(asked, json.loads(body)["choices"][0]["text"])
        else:
            self._told(response.status, body)

    def _stream(self, draw: random.Random, pause: float = 0.0) -> None:
        asked = {**self._request(draw), "stream": True}
        connection, response = self._send(asked)
        if response.status != 200:
            self._told(response.status, response.read())
            connection.close()
            return
        text, done = "", False
        for line in response:
            time.sleep(pause)
            if line == b"data: [DONE]\n":
                done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    if not (self._lenient and event["error"]["code"] in ("engine_crashed", "engine_loading")):
                        self._wrong(f"in a stream: {event}")
                    self._count("retried")
                    break
                text += event["choices"][0]["text"]
        else:
            if done:
                self._check(asked, text)
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
        if response.status in (400, 404) and json.loads(body)["error"]["message"]:
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
        sizes: list[float] = []

        def watch() -> None:
            while server.poll() is None:
                sizes.append(memory(server.pid))
                time.sleep(seconds / 20)

        def kill() -> None:
            for child in children(server.pid):
                if b"polydraft" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(child, signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
        threading.Timer(seconds / 2, kill).start()
        report = run(url, clients, seconds, lenient=True)
        print("memory of the server, MiB:", *(f"{size:.0f}" for size in sizes))
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
    print(f"{report.right} right, {report.refused} refused, {report.retried} told to try again, "
          f"{report.cancelled} cancelled, {report.tokens / given.seconds:.0f} tokens/s")  # fmt: skip
    for what in report.wrong[:20]:
        print("wrong:", what)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
