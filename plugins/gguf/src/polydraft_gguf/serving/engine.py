"""llama.cpp's server as an engine: one server, or two."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

from polydraft.contract import Generation, GenerationSettings, OffReason, Round, RunningInfo, Tokenizer, WholeEngine
from polydraft.errors import UnsupportedError

from polydraft_gguf.serving.client import Client
from polydraft_gguf.serving.guided import check_guided
from polydraft_gguf.serving.rounds import Rounds

__all__ = ["LlamaServerEngine", "RunningServer"]


class RunningServer(Protocol):
    """A server that is ready, wherever it runs."""

    @property
    def client(self) -> Client:
        """Its client."""

    def check_alive(self) -> None:
        """Raise an ``EngineError`` with its last words if it has ended."""

    def stop(self) -> None:
        """Stop it if it was started here. May be called twice."""


class LlamaServerEngine(WholeEngine):
    """One server, or two: a server cannot turn drafts off for a request, so plain calls go to a second one.

    Args:
        tokenizer: The target's.
        running: What runs.
        server: With the drafter, if there is one.
        start_plain: Starts the server without a drafter, at the first plain call; None if ``server`` was not started
            here.
        release: Frees what the tokenizer needs, last of all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        running: RunningInfo,
        server: RunningServer,
        start_plain: Callable[[], RunningServer] | None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.running = running
        self.server = server
        self.plain_server: RunningServer | None = server if running.method is None else None
        self._start_plain = start_plain
        self._starting = threading.Lock()
        self._release = release

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Send the request at once; errors while it is read are those of ``Rounds``.

        Raises:
            UnsupportedError: Plain decoding was asked for, and the server that runs at the url drafts.
        """
        server = self.server if generation.request.speculate else self._plain()
        return Rounds(server.client, generation, self.tokenizer, self.running.dtype, check_alive=server.check_alive)

    def check_settings(self, settings: GenerationSettings) -> None:
        """Refuse what llama.cpp's own grammars cannot say, or leave out in silence."""
        if settings.guided is not None:
            check_guided(settings.guided)

    def speculation_conflict(self, settings: GenerationSettings) -> OffReason | None:
        """The server gives drafted tokens no log-probabilities: it reports 0 for them."""
        if settings.logprobs is None:
            return None
        return OffReason(
            code="settings", message="llama.cpp's server does not compute log-probabilities of drafted tokens."
        )

    def _plain(self) -> RunningServer:
        with self._starting:
            if self.plain_server is None:
                if self._start_plain is None:
                    raise UnsupportedError(
                        f"The server at {self.server.client.url} drafts for every request.",
                        "Load a second session with `drafter=None` on a server without a drafter.",
                    )
                self.plain_server = self._start_plain()
            return self.plain_server

    def close(self) -> None:
        """Stop the servers that were started here, each even if another's stop fails or is interrupted."""
        with ExitStack() as parts:  # the last first
            parts.callback(self._release)
            for server in (self.plain_server, self.server):
                if server is not None:
                    parts.callback(server.stop)
