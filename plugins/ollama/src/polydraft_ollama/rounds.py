"""One generation on the server: the lines of its answer as rounds."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from polydraft.contract import EndReason, GenerationStats, Round
from polydraft.errors import EngineError

from polydraft_ollama.request import request_of

if TYPE_CHECKING:
    from polydraft.contract import Generation
    from polydraft.text.text_only import TextOnlyTokenizer

    from polydraft_ollama.client import OllamaClient

__all__ = ["Rounds"]

_WAIT = 0.05
"""Seconds after which a reader that waits sees whether it was cancelled."""
_REPEATED = 30
"""After so many equal pieces Ollama gives up an answer, and ends the stream without a last line."""


class _Piece(NamedTuple):
    """Text of an answer, as ids, and when it came."""

    token_ids: list[int]
    received: float


class _Done(NamedTuple):
    """The last line; None: it does not say."""

    reason: EndReason
    num_tokens: int | None
    num_prompt_tokens: int | None
    num_reused_tokens: int | None
    prefill_seconds: float | None
    decode_seconds: float | None


class Rounds(Iterator[Round]):
    """The rounds of one request. Not a generator: ``close`` must end the request even if no round was read.

    Raises:
        EngineError: The server failed, or ended its answer without a last line.
    """

    def __init__(
        self,
        client: OllamaClient,
        body: Mapping[str, Any],
        options: Mapping[str, Any],
        generation: Generation,
        tokenizer: TextOnlyTokenizer,
        num_speculative_tokens: int | None,
        *,
        counts_prompts: bool,
    ) -> None:
        self._counts_prompts = counts_prompts
        self._client = client
        self._generation = generation
        self._tokenizer = tokenizer
        prompt = tokenizer.prompt(generation.request.prompt_token_ids)
        path, request = request_of(
            generation.request, prompt, body, options, num_speculative_tokens=num_speculative_tokens
        )
        self._closed = threading.Event()
        self._found: queue.SimpleQueue[_Piece | _Done | BaseException] = queue.SimpleQueue()
        self._pieces = 0
        self._latest = self._begun = self._first = time.perf_counter()
        self._thread = threading.Thread(target=self._read, args=(path, request), name="polydraft-answer", daemon=True)
        self._thread.start()

    def __next__(self) -> Round:
        generation = self._generation
        while generation.finish_reason is None and not generation.cancelled():
            try:
                found = self._found.get(timeout=_WAIT)
            except queue.Empty:
                continue
            if isinstance(found, BaseException):
                self.close()
                raise found
            if isinstance(found, _Done):
                self._report(found)
                generation.finish(found.reason)
                continue
            counted = self._counted
            seconds, self._latest = found.received - self._latest, found.received
            self._first = found.received if self._pieces == 0 else self._first
            self._pieces += 1
            self._report()
            return generation.emit(
                found.token_ids, num_draft_tokens=counted, num_accepted_tokens=counted, seconds=seconds
            )
        self.close()
        raise StopIteration

    @property
    def _counted(self) -> int | None:
        """Tokens drafted and accepted: Ollama does not say, and without drafts there are none."""
        return None if self._generation.request.speculate else 0

    def _report(self, done: _Done | None = None) -> None:
        """What the server counted and measured; until it says so, pieces of text and this client's clock."""
        tokens = prompt = reused = None
        if done is not None:
            _, tokens, prompt, reused, prefill, decode = done
        else:
            prefill, decode = self._first - self._begun, self._latest - self._first
        self._generation.report(
            GenerationStats(
                num_tokens=self._pieces if tokens is None else tokens,
                num_prompt_tokens=prompt,
                num_reused_tokens=reused,
                num_drafts=self._counted,
                num_draft_tokens=self._counted,
                num_accepted_tokens=self._counted,
                prefill_seconds=prefill,
                decode_seconds=decode,
            )
        )

    def close(self) -> None:
        """Close the connection, upon which the server gives up the request. May be called twice."""
        self._closed.set()
        self._thread.join()

    def _read(self, path: str, request: dict[str, Any]) -> None:
        try:
            for found in self._answer(path, request):
                self._found.put(found)
        except BaseException as error:  # raised again where the answer is read
            self._found.put(error)

    def _answer(self, path: str, request: dict[str, Any]) -> Iterator[_Piece | _Done]:
        client, of = self._client, self._generation.request
        latest, repeated, thinks = "", 0, False
        events = client.answer(
            path,
            request,
            num_tokens=of.settings.max_new_tokens,
            num_prompt_tokens=len(of.prompt_token_ids),
            cancelled=self._closed.is_set,
        )
        with closing(events):
            for event in events:
                told = event.get("message") if path == "/api/chat" else event
                told = {} if told is None else told
                if not isinstance(told, dict):
                    raise client.malformed("its message is not an object")
                thinking = self._text(told, "thinking")
                text = self._text(told, "content" if path == "/api/chat" else "response")
                ids: list[int] = []
                if thinking:
                    ids += [] if thinks else self._mark("<think>")
                    ids += self._tokenizer.encode(thinking)
                    thinks = True
                done, calls = event.get("done") is True, told.get("tool_calls") or []
                if not isinstance(calls, list):
                    raise client.malformed("its tool_calls are not a list")
                if thinks and (text or calls or done):
                    ids += self._mark("</think>")
                    thinks = False
                ids += self._tokenizer.encode(text)
                for call in calls:
                    ids += self._call(call)
                if ids:
                    yield _Piece(ids, time.perf_counter())
                if done:
                    yield self._end(event)
                    return
                # As the server counts: by the piece without blanks around it.
                latest, repeated = text.strip(), repeated + 1 if text.strip() == latest else 0
        if not self._closed.is_set():
            why = "ended its answer before its end"
            if repeated >= _REPEATED:
                why = (
                    f"gave up its answer, as it does after {_REPEATED} equal pieces in a row ({client.shown(latest)!r})"
                )
            raise EngineError(f"{client.name} {why}.", "Look at its log.")

    def _text(self, told: Mapping[str, Any], field: str) -> str:
        text = told.get(field)
        if text is not None and not isinstance(text, str):
            raise self._client.malformed(f"its {field} is not text")
        # JSON can spell half of a surrogate pair, which is no text.
        return (text or "").encode(errors="replace").decode()

    def _mark(self, name: str) -> list[int]:
        found = self._tokenizer.token_id(name)
        assert found is not None
        return [found]

    def _call(self, call: Any) -> list[int]:
        """A tool call, between the brackets that the core reads."""
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise self._client.malformed("a tool call has no function")
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, dict | str):
            raise self._client.malformed("the arguments of a tool call are not an object")
        told = {"name": function["name"], "arguments": arguments}
        return [
            *self._mark("<tool_call>"),
            *self._tokenizer.encode(json.dumps(told, ensure_ascii=False)),
            *self._mark("</tool_call>"),
        ]

    def _end(self, event: Mapping[str, Any]) -> _Done:
        """Why the answer has ended, and what its last line counts."""
        request = self._generation.request
        tokens, prefill, decode = (
            self._count(event, name) for name in ("eval_count", "prompt_eval_duration", "eval_duration")
        )
        # The cached ones are among the prompt's; a server that tells them counts both.
        prompt, reused = (self._count(event, f"prompt_eval_{name}") for name in ("count", "cached_count"))
        if reused is None and not self._counts_prompts:
            prompt = None
        reason: EndReason = "eos"
        if event.get("done_reason") == "length":
            # Fewer tokens than were asked for: the context, whose length the server may have chosen, is full.
            short = tokens is not None and tokens < request.settings.max_new_tokens
            reason = "context" if short else "length"
        # The server's times are nanoseconds.
        seconds = (None if time is None else time / 1e9 for time in (prefill, decode))
        return _Done(reason, tokens, prompt or None, reused, *seconds)

    def _count(self, event: Mapping[str, Any], field: str) -> int | None:
        """A whole number of the last line, which leaves out zeros; None: not told."""
        value = event.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**63:
            raise self._client.malformed(f"its {field} is not a number")
        return int(value)
