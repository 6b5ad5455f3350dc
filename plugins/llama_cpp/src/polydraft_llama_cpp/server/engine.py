"""A llama-server as an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from polydraft.contract import Generation, Round, RunningInfo, WholeEngine
from polydraft.errors import EngineError, UnsupportedError

from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.server.program import Server
from polydraft_llama_cpp.server.rounds import rounds
from polydraft_llama_cpp.tokenizer import GgufTokenizer

__all__ = ["LlamaServerEngine"]


class LlamaServerEngine(WholeEngine):
    """One server, or two: a server cannot turn drafts off for a request, so plain calls go to a second one.

    ``vocabulary`` (the target's file without weights) is freed with this engine, and ``server`` stopped if it was
    started here. ``start_plain`` starts the server without a drafter at the first plain call; None if the server was
    not started here.
    """

    def __init__(
        self,
        vocabulary: Model,
        tokenizer: GgufTokenizer,
        running: RunningInfo,
        server: Server,
        start_plain: Callable[[], Server] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.running = running
        self.server = server
        self.plain_server: Server | None = server if running.method is None else None
        self._vocabulary = vocabulary
        self._start_plain = start_plain
        self._starting = threading.Lock()

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Ask the server for tokens until the output ends.

        Raises:
            UnsupportedError: Plain decoding was asked for, and the server that runs at the url drafts.
            EngineError: The server failed; if it has ended, its last words are in the message.
        """
        server = self.server if generation.request.speculate else self._plain()
        try:
            yield from rounds(server.client, generation, self.tokenizer.vocab_size)
        except EngineError:
            if server.process is not None:
                server.process.check_alive()
            raise

    def _plain(self) -> Server:
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
            parts.callback(self._vocabulary.free)
            for server in (self.plain_server, self.server):
                if server is not None:
                    parts.callback(server.stop)
