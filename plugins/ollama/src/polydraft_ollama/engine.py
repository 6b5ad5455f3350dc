"""A model of an Ollama server as an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from polydraft.contract import Round, WholeEngine
from polydraft.text.text_only import TextOnlyTokenizer

from polydraft_ollama.client import OllamaClient, can_draft, counts_prompts
from polydraft_ollama.rounds import Rounds

if TYPE_CHECKING:
    from polydraft.contract import Generation, RunningInfo

__all__ = ["OllamaEngine"]


class OllamaEngine(WholeEngine):
    """A server that is sent text or messages, and answers with text.

    Args:
        client: Of the server.
        body: What each request begins with: the model, and how long it stays loaded.
        options: Those that all requests share: a request with others makes the server load the model anew.
        running: What runs.
    """

    def __init__(
        self, client: OllamaClient, body: Mapping[str, Any], options: Mapping[str, Any], running: RunningInfo
    ) -> None:
        self.client = client
        self.body = body
        self.options = options
        self.running = running
        self.tokenizer: TextOnlyTokenizer = TextOnlyTokenizer()

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Send the request at once; a thread reads the answer whether or not the iterator is read.

        Raises:
            InvalidRequestError: A variable for the chat template that Ollama does not have.
            UnsupportedError: The prompt continues a chat.
        """
        version = self.running.engine_version
        k = self.running.num_speculative_tokens if can_draft(version) else None
        counts = counts_prompts(version)
        return Rounds(self.client, self.body, self.options, generation, self.tokenizer, k, counts_prompts=counts)

    def close(self) -> None:
        """Nothing to free: the server keeps the model as long as ``keep_alive`` says."""
