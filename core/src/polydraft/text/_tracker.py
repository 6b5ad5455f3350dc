"""Track the emitted tokens of one generation: when it ends, and its text."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from polydraft.contract.results import FinishReason, Segment, ToolCall
from polydraft.text._chat_parser import ChatParser, Piece
from polydraft.text._stops import StopMatcher

if TYPE_CHECKING:
    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.tokenizer import Tokenizer
    from polydraft.text._response_parser import ResponseParser
    from polydraft.text._response_template import ResponseTemplate

__all__ = ["OutputTracker", "TextDelta"]


def _utf8_decoder() -> codecs.IncrementalDecoder:
    """Never splits a character; joined output equals ``bytes.decode("utf-8", "replace")`` of the joined input."""
    return codecs.getincrementaldecoder("utf-8")("replace")


class TextDelta(NamedTuple):
    """Text that became stable: no later token or stop string can change it."""

    text: str
    segments: tuple[Segment, ...]
    thinking: str
    tool_calls: tuple[ToolCall, ...]


class OutputTracker:
    """Gets each emitted token in order, decides when the generation ends, and releases text once it is stable.

    The raw text is every token's text, special tokens by name; stop strings are matched in it. The answer is the raw
    text without special tokens, thinking and tool calls, up to the start of a stop string.

    Args:
        tokenizer: The target's tokenizer.
        request: Its limits, stops and prompt are used.
        parse_chat: Whether to separate thinking and tool calls from the answer.
        response_template: How the checkpoint says that this is done; None: by the formats that polydraft knows.
        tools: The normalised tools of the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: TokenRequest,
        *,
        parse_chat: bool,
        response_template: ResponseTemplate | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        """Ids of emitted tokens lie below it."""
        self.text_only = bool(getattr(tokenizer, "text_only", False))
        """Whether ids are no tokens: the engine keeps the limits."""
        self._settings = request.settings
        self._eos = request.eos_token_ids
        self._ends = request.eos_token_ids | frozenset(request.settings.stop_token_ids)
        self._room = request.max_total_tokens - len(request.prompt_token_ids)
        self._special = tokenizer.special_token_ids
        self._decoder = _utf8_decoder()
        self._stops = StopMatcher(request.settings.stop)
        self._parser: ChatParser | ResponseParser
        if response_template is not None and parse_chat:
            from polydraft.text._response_parser import ResponseParser

            self._parser = ResponseParser(response_template, request.prompt_token_ids, tools)
        else:
            self._parser = ChatParser(tokenizer, request.prompt_token_ids, parse_chat=parse_chat)
        self._ids: list[int] = []
        self._raw: list[str] = []
        self._pending: deque[Piece] = deque()  # decoded since the last delta, or held back by it
        self._held: deque[Piece] = deque()  # may become a stop string
        self._text: list[str] = []
        self._segments: list[Segment] = []
        self._thinking: list[str] = []
        self._calls: list[ToolCall] = []
        self.stop_match: str | int | None = None
        self.finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All emitted tokens."""
        return tuple(self._ids)

    @property
    def num_tokens(self) -> int:
        """Number of emitted tokens."""
        return len(self._ids)

    @property
    def text(self) -> str:
        """The answer, as far as it is stable."""
        return "".join(self._text)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The answer, as far as it is stable, split by origin."""
        groups = groupby(self._segments, key=attrgetter("is_draft"))
        return tuple(Segment(text="".join(one.text for one in group), is_draft=drafts) for drafts, group in groups)

    @property
    def raw_text(self) -> str:
        """All emitted tokens as text."""
        return "".join(self._raw)

    @property
    def thinking(self) -> str:
        """The thinking, as far as it is stable."""
        return "".join(self._thinking)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls completed so far."""
        return tuple(self._calls)

    def push(self, token_id: int, *, is_draft: bool) -> FinishReason | None:
        """Add one emitted token.

        Returns:
            Why the generation ends with this token; None if it continues.
        """
        self._ids.append(token_id)
        count = len(self._ids)
        # The text first: the token that ends the output is part of ``raw_text``.
        stop = self._add_text(token_id, is_draft)
        ends = token_id in self._ends or stop is not None
        # The token has index count - 1 in the output; ``sampling`` bans ends before index ``min_new_tokens``.
        if ends and count > self._settings.min_new_tokens:
            self.finish_reason = "eos" if token_id in self._eos else "stop"
            self.stop_match = token_id
            # A stop token that also completes a stop string counts as the token: nothing is cut then.
            if stop is not None and token_id not in self._ends:
                past, self.stop_match = stop
                self._cut(past)
            elif token_id in self._special and token_id not in self._parser.marks:
                self._pending.pop()  # the end of the output is not a part of a call that it leaves unfinished
        elif self.text_only:
            pass
        elif count >= self._settings.max_new_tokens:
            self.finish_reason = "length"
        elif count >= self._room:
            self.finish_reason = "context"
        return self.finish_reason

    def take(self) -> TextDelta:
        """Text that became stable since the last call."""
        return self._stable_text(held=self._stops.held() if self._settings.stop else 0)

    def finish(self, reason: FinishReason | None = None) -> TextDelta:
        """All remaining text. Sets ``finish_reason`` to ``reason`` if no token ended the generation."""
        if self.finish_reason is None:
            self.finish_reason = reason
        # Bytes of an unfinished character become U+FFFD.
        rest = self._decoder.decode(b"", final=True)
        if rest:
            self._raw.append(rest)
            # After a stop string the answer has ended already: the rest belongs to ``raw_text`` only.
            if self.finish_reason != "stop" or not isinstance(self.stop_match, str):
                self._pending.append(Piece(rest, None, is_draft=False, whole=True))
        return self._stable_text(held=0, ended=True)

    def _add_text(self, token_id: int, is_draft: bool) -> tuple[int, str] | None:
        """Append the token's text to what is pending. Returns what ``StopMatcher.feed`` found in it."""
        unfinished = ""
        if token_id in self._special or token_id in self._parser.marks:
            # A special token's name never joins an unfinished character before it.
            unfinished = self._decoder.decode(b"", final=True)
            if unfinished:
                self._pending.append(Piece(unfinished, None, is_draft, whole=True))
            self._decoder = _utf8_decoder()
        spelled = self._tokenizer.token_bytes(token_id)
        if not isinstance(spelled, bytes):
            raise TypeError(f"the tokenizer's token_bytes({token_id}) gave a {type(spelled).__name__}, not bytes")
        text = self._decoder.decode(spelled)
        self._pending.append(Piece(text, token_id, is_draft, whole=True))
        self._raw.append(unfinished + text)
        return self._stops.feed(unfinished + text) if self._settings.stop else None

    def _cut(self, past: int) -> None:
        """Drop the last ``past`` characters of the raw text from what is pending."""
        while past > 0 and self._pending:
            piece = self._pending.pop()
            if len(piece.text) > past:
                # A bracket that is cut has no effect: its call stays unfinished.
                self._pending.append(piece._replace(text=piece.text[: len(piece.text) - past], whole=False))
                return
            past -= len(piece.text)

    def _stable_text(self, held: int, *, ended: bool = False) -> TextDelta:
        """Make all pending text stable, except the last ``held`` characters, which may become a stop string."""
        if held:
            self._hold(held)
        while self._pending:
            self._parser.feed(self._pending.popleft())
        # Before the delta is built, since an unfinished call becomes part of its text.
        if ended:
            self._parser.finish()
        # What was held is pending for the next call; the emptied deque is used again.
        self._pending, self._held = self._held, self._pending
        sink = self._parser.sink
        segments = tuple(
            Segment(text="".join(text for text, _ in group), is_draft=is_draft)
            for is_draft, group in groupby(sink.answer, key=itemgetter(1))
        )
        answer = "".join(text for text, _ in sink.answer)
        delta = TextDelta(answer, segments, "".join(sink.thinking), tuple(sink.calls))
        sink.clear()
        self._text.append(delta.text)
        self._segments.extend(segments)
        self._thinking.append(delta.thinking)
        self._calls.extend(delta.tool_calls)
        return delta

    def _hold(self, held: int) -> None:
        """Move the last ``held`` pending characters to the pieces held for the next call."""
        while held > 0 and self._pending:
            piece = self._pending.pop()
            if len(piece.text) > held:
                # Split: only the second half may be a stop string, and only with it the token is whole.
                start = len(piece.text) - held
                self._pending.append(piece._replace(text=piece.text[:start], whole=False))
                piece = piece._replace(text=piece.text[start:])
            held -= len(piece.text)
            # Pieces come from the end of the text backwards.
            self._held.appendleft(piece)
