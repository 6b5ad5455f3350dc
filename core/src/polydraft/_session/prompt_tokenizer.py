"""The tokenizer as prompts are encoded with it: what it raises or returns wrongly is the engine's fault."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from polydraft._session.failures import as_engine_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft.contract.results import RunningInfo
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["PromptTokenizer"]


class PromptTokenizer:
    """The part of a tokenizer that encodes prompts.

    Raises:
        EngineError: By each method, if the tokenizer fails or gives no list of token ids.
    """

    def __init__(self, tokenizer: Tokenizer, running: RunningInfo) -> None:
        self._tokenizer = tokenizer
        self._running = running

    @property
    def bos_token_id(self) -> int | None:
        """Beginning-of-sequence id; None if the model has none."""
        return self._tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an added BOS."""
        return self._checked(lambda: self._tokenizer.encode(text))

    def chat(self, messages: Any, *, tools: Any, template_kwargs: Any) -> list[int]:
        """Token ids of chat messages."""
        return self._checked(lambda: self._tokenizer.chat(messages, tools=tools, template_kwargs=template_kwargs))

    def _checked(self, encode: Callable[[], Any]) -> list[int]:
        with as_engine_errors(self._running, "in encoding the prompt"):
            token_ids = encode()
            sequence = isinstance(token_ids, (list, tuple))
            if not sequence or set(map(type, token_ids)) - {int} or min(token_ids, default=0) < 0:
                raise TypeError(f"the tokenizer gave {reprlib.repr(token_ids)}, which is not a list of token ids")
            return list(token_ids)
