"""A real server on the loopback interface, in a thread, and plain HTTP to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from polydraft_server.app import Api
from polydraft_server.run import Server, listen
from polydraft_server.settings import ServerSettings

__all__ = ["Answer", "Serving", "eventually", "serving"]


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert found["message"].rstrip()[-1] in ".!?", found
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream, which must have ended as it should."""
        lines = [line for line in self.body.decode().split("\n") if line.startswith("data: ")]
        assert lines, self.body
        if lines[-1] == "data: [DONE]":
            del lines[-1]
        else:
            assert "error" in json.loads(lines[-1].removeprefix("data: "))
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@dataclass
class Serving:
    """A server that runs."""

    api: Api
    server: Server
    port: int
    thread: threading.Thread
    failures: list[BaseException] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self, timeout: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = self.connect()
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            return answer_of(connection)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, raw, **{"Content_Type": "application/json", **headers})

    def chat(self, text: str = "Hi", **fields: Any) -> Answer:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def complete(self, prompt: Any = "Hi", **fields: Any) -> Answer:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def answer_of(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


@contextlib.contextmanager
def serving(session: Any, *, load: Any = None, local: bool = True, **settings: Any) -> Any:
    """Serve a session until the block ends."""
    given = ServerSettings(port=0, **{"stop_seconds": 0.2, **settings})
    listening = listen(given)
    server = Server(Api(session, given, load, local), listening)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(server.serve([listening]))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    found = Serving(server.api, server, listening.getsockname()[1], thread, failures)
    eventually(lambda: server.started or failures)
    assert not failures, failures
    try:
        yield found
    finally:
        found.stop()
        session.close()
    assert not failures, failures


def eventually(holds: Any, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
