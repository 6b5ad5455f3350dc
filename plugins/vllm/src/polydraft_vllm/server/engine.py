"""A vLLM server as an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from polydraft.contract import Round, WholeEngine
from polydraft.errors import UnsupportedError

from polydraft_vllm.server.request import ServerRequest
from polydraft_vllm.server.rounds import Rounds, completion_arguments
from polydraft_vllm.server.statistics import CounterReading
from polydraft_vllm.settings import check_settings

if TYPE_CHECKING:
    from polydraft.contract import Generation, GenerationSettings, RunningInfo, Tokenizer
    from polydraft.engine_parts.serving import ServerProcess

    from polydraft_vllm.server.client import ServerClient
    from polydraft_vllm.server.inspection import Abilities

__all__ = ["VllmServerEngine"]


class VllmServerEngine(WholeEngine):
    """A server that is sent token ids and returns token ids: text, stop strings and chat are the core's.

    ``process``, a server that was started for it, is stopped with this engine. ``reuses``: whether requests may reuse
    the KV of earlier ones.
    """

    def __init__(
        self,
        client: ServerClient,
        process: ServerProcess | None,
        abilities: Abilities,
        tokenizer: Tokenizer,
        running: RunningInfo,
        *,
        reuses: bool = True,
    ) -> None:
        self.client = client
        self.process = process
        self.abilities = abilities
        self.tokenizer = tokenizer
        self.running = running
        self._reuses = reuses

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Send the request at once; a thread reads the answer whether or not the iterator is read.

        Raises:
            UnsupportedError: The caller asked for plain decoding, and this server speculates for every request.
        """
        off, abilities = generation.speculation_off, self.abilities
        plain = off is not None and bool(abilities.speculates)
        if plain and off is not None and off.code == "caller" and not abilities.plain_requests:
            raise UnsupportedError(
                f"The vLLM server at {self.client.url} cannot decode a single request without speculation.",
                "Start it with `polydraft serve`, or without a drafter.",
            )
        counted = abilities.speculates and not abilities.reports_requests and not plain
        before = CounterReading(self.client) if counted else None
        arguments = completion_arguments(generation.request, abilities.model, plain=plain, reuses=self._reuses)
        sent = ServerRequest(self.client, self.tokenizer.vocab_size, arguments)
        return Rounds(self.client, abilities, generation, sent, before, self.running.dtype)

    def check_settings(self, settings: GenerationSettings) -> None:
        """Refuse what vLLM would change or refuse itself: see ``settings.check_settings``."""
        check_settings(settings, speculates=bool(self.abilities.speculates))

    def close(self) -> None:
        """Stop the server if it was started here."""
        if self.process is not None:
            try:
                self.process.stop()
            finally:  # also when Ctrl+C interrupts it
                self.process.discard_log()
