"""Answers in OpenAI's shapes, whole and as chunks of a stream, for chats and for completions."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from polydraft import Chunk, GenerationResult, TokenLogprobs, ToolCall
from polydraft.contract import Tokenizer

from polydraft_server.drafts import RoundCounts, drafts_of, token_text, usage_of
from polydraft_server.generation import finish_reason

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "encoded"]

_LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON cannot say: vLLM's number."""


def encoded(data: Any) -> bytes:
    """JSON in UTF-8. Half of a surrogate pair, which a client may have sent, becomes JSON's escape of it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class Answer(ABC):
    """The answer to one request.

    Args:
        model: What the request calls the model.
        tokenizer: The target's.
        choices: Number of choices.
        prompts: Number of prompts, each with as many choices.
        one_call: Whether each ends with its first tool call.
        token_ids: Whether token ids are wanted.
    """

    prefix: str
    name: str

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        choices: int,
        *,
        prompts: int = 1,
        one_call: bool = False,
        token_ids: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._one_call = one_call
        self._wants_ids = token_ids
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._counts = [RoundCounts() for _ in range(choices)]
        self._results: dict[int, GenerationResult] = {}
        self._ids_told = [0] * choices
        """Token ids of each choice that chunks had before the first whose ids are not certain yet."""
        self._ids_open = [False] * choices

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def add(self, index: int, event: Chunk | GenerationResult) -> None:
        """Take what came for a choice; ``whole`` needs no more."""
        if isinstance(event, Chunk):
            self._counts[index].count(event)
        else:
            self._results[index] = event

    def whole(self) -> dict[str, Any]:
        """The answer, once all results are there."""
        choices = [self._choice(index, self._results[index]) for index in sorted(self._results)]
        return {**self._envelope(self.name, choices), **self._totals()}

    def parts(self, index: int, event: Chunk | GenerationResult) -> Iterator[dict[str, Any]]:
        """The chunks of a stream for what came for a choice."""
        self.add(index, event)
        if isinstance(event, Chunk):
            part = self._part(index, event)
            part["polydraft"] = drafts_of(event, self._tokenizer)
            if self._wants_ids:
                part["token_ids"] = self._certain(index, event)
        else:
            part = self._last(index, event)
            part["polydraft"] = {"stats": event.stats.with_rates(), **self._off(event)}
            if self._wants_ids:
                rest = None if event.token_ids is None else event.token_ids[self._ids_told[index] :]
                part["token_ids"] = rest if self._ids_open[index] else []
                part["prompt_token_ids"] = event.prompt_token_ids
        yield self._envelope(self._stream_name(), [part])

    def _certain(self, index: int, chunk: Chunk) -> Sequence[int] | None:
        """A chunk's token ids; None from the first on that are not certain yet: the last chunk has the rest."""
        self._ids_open[index] |= chunk.token_ids is None
        if self._ids_open[index]:
            return None
        self._ids_told[index] += len(chunk.token_ids)
        return chunk.token_ids

    def beginning(self) -> Iterator[dict[str, Any]]:
        """The chunks before the first token."""
        return iter(())

    def usage(self) -> dict[str, Any]:
        """The chunk of a stream that holds the usage."""
        return {**self._envelope(self._stream_name(), []), **self._totals()}

    def _totals(self) -> dict[str, Any]:
        results = [self._results[index] for index in sorted(self._results)]
        found: dict[str, Any] = {"usage": usage_of(results, self._prompts)}
        if len(self._results) == 1:  # as vLLM: several generations have no common times
            found["metrics"] = self._counts[0].metrics(self._results[0])
        return found

    def _common(self, index: int, result: GenerationResult) -> dict[str, Any]:
        """What every whole choice has."""
        found: dict[str, Any] = {
            "index": index,
            "finish_reason": finish_reason(result, one_call=self._one_call),
            "stop_reason": result.stop_match if result.finish_reason == "stop" else None,
            "polydraft": {"stats": result.stats.with_rates(), **self._off(result)},
        }
        if self._wants_ids:
            found["token_ids"] = result.token_ids
            found["prompt_token_ids"] = result.prompt_token_ids
        return found

    def _off(self, result: GenerationResult) -> dict[str, Any]:
        off = result.speculation_off
        return {"seed": result.settings.seed, "speculation_off": None if off is None else off.code}

    def _stream_name(self) -> str:
        return self.name

    @abstractmethod
    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def _part(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """A choice of a stream's chunk."""

    @abstractmethod
    def _last(self, index: int, result: GenerationResult) -> dict[str, Any]:
        """The choice of a stream that says how it ended."""


class ChatAnswer(Answer):
    """The answer of ``/v1/chat/completions``."""

    prefix, name = "chatcmpl", "chat.completion"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._calls = [0] * len(self._counts)

    def _stream_name(self) -> str:
        return "chat.completion.chunk"

    def beginning(self) -> Iterator[dict[str, Any]]:
        """Who speaks."""
        for index in range(len(self._counts)):
            delta = {"role": "assistant", "content": ""}
            yield self._envelope(self._stream_name(), [{"index": index, "delta": delta, "finish_reason": None}])

    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        calls = self._kept(result.tool_calls)
        message: dict[str, Any] = {
            "role": "assistant",
            # Null where the model only calls tools, as in OpenAI's answers.
            "content": result.text if result.text or not calls else None,
            "refusal": None,
        }
        if result.thinking:
            message["reasoning_content"] = result.thinking
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        logprobs = self._logprobs(result.logprobs)
        return {**self._common(index, result), "message": message, "logprobs": logprobs}

    def _part(self, index: int, chunk: Chunk) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.thinking:
            delta["reasoning_content"] = chunk.thinking
        if calls := self._kept(chunk.tool_calls):
            first = self._calls[index]
            delta["tool_calls"] = [{"index": first + at, **_call(call)} for at, call in enumerate(calls)]
            self._calls[index] += len(calls)
        return {"index": index, "delta": delta, "logprobs": self._logprobs(chunk.logprobs), "finish_reason": None}

    def _last(self, index: int, result: GenerationResult) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finish_reason(result, one_call=self._one_call),
            "stop_reason": result.stop_match if result.finish_reason == "stop" else None,
        }

    def _kept(self, calls: Sequence[ToolCall]) -> Sequence[ToolCall]:
        return calls[:1] if self._one_call else calls

    def _logprobs(self, entries: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = [
            {
                **self._logprob(entry.token_id, entry.logprob),
                "top_logprobs": [self._logprob(token_id, value) for token_id, value in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(token_id)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(spelled),
        }


class CompletionAnswer(Answer):
    """The answer of ``/v1/completions``."""

    prefix, name = "cmpl", "text_completion"

    def __init__(self, *arguments: Any, echoed: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._echoed = echoed
        self._offsets = [0] * len(self._counts)
        self._begun: set[int] = set()

    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        text = self._echo(index) + result.text
        return {**self._common(index, result), "text": text, "logprobs": self._logprobs(index, result.logprobs)}

    def _part(self, index: int, chunk: Chunk) -> dict[str, Any]:
        text = chunk.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._echo(index) + text
        logprobs = self._logprobs(index, chunk.logprobs)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _last(self, index: int, result: GenerationResult) -> dict[str, Any]:
        return {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": finish_reason(result),
            "stop_reason": result.stop_match if result.finish_reason == "stop" else None,
        }

    def _echo(self, index: int) -> str:
        return "" if self._echoed is None else self._echoed[index]

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        tokens = [token_text(self._tokenizer, entry.token_id) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, _LEAST_LOGPROB) for entry in entries],
            "top_logprobs": [
                {token_text(self._tokenizer, token_id): max(value, _LEAST_LOGPROB) for token_id, value in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
