"""The tokenizer of an engine in a worker, as the app's session uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polydraft._workers.messages import TokenizerFacts
from polydraft.text.ids_only import IdsOnlyTokenizer

if TYPE_CHECKING:
    from polydraft._workers.process import WorkerProcess
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["WorkerTokenizer", "tokenizer_of"]

_BLOCK = 256
"""Spellings that are asked for at a time."""


class WorkerTokenizer:
    """Implements ``polydraft.contract.Tokenizer`` over questions to the worker.

    A prompt is one question. The bytes of generated tokens come along with their rounds, and are kept, so that a round
    asks for nothing.

    Args:
        worker: The worker.
        facts: What it said at load.
    """

    def __init__(self, worker: WorkerProcess, facts: TokenizerFacts) -> None:
        self._worker = worker
        self.vocab_size = facts.vocab_size
        self.bos_token_id = facts.bos_token_id
        self.eos_token_ids = facts.eos_token_ids
        self.special_token_ids = facts.special_token_ids
        self.response_template = facts.response_template
        self.text_only = facts.text_only
        self._bytes = worker.spellings
        self._ids: dict[str, int | None] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without added special tokens."""
        return list(self._worker.ask("encode", {"text": text}, doing="while it encoded the prompt").value)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; asked for, with those of its neighbours, unless it has been generated before."""
        found = self._bytes.get(token_id)
        if found is None:
            first = token_id - token_id % _BLOCK
            among = [other for other in range(first, min(first + _BLOCK, self.vocab_size)) if other not in self._bytes]
            # An id that the tokenizer refuses is asked for alone, for its own error.
            self._worker.ask("spell", {"token_ids": among, "asked": token_id})
            found = self._bytes[token_id]
        return found

    def token_id(self, token: str) -> int | None:
        """The id of the token of this name; None if the vocabulary lacks it."""
        if token not in self._ids:
            self._ids[token] = self._worker.ask("token_id", {"token": token}).value
        return self._ids[token]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of the messages through the model's chat template. Errors as for ``Tokenizer.chat``."""
        answer = self._worker.ask(
            "chat",
            {
                "messages": messages,
                "tools": tools,
                "template_kwargs": template_kwargs,
                "continue_final_message": continue_final_message,
            },
            doing="while it encoded the prompt",
        )
        return list(answer.value)


def tokenizer_of(worker: WorkerProcess, facts: TokenizerFacts) -> Tokenizer:
    """The tokenizer of a loaded engine: over the worker, or the stand-in for none."""
    if facts.ids_only:
        return IdsOnlyTokenizer(facts.vocab_size, eos_token_ids=facts.eos_token_ids, bos_token_id=facts.bos_token_id)
    return WorkerTokenizer(worker, facts)
