"""Follows the emitted tokens of one generation: when it ends, and what text it makes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydraft.contract.results import FinishReason, Segment, ToolCall
from polydraft.text._chat_parser import ChatParser, Part, parse_tool_call
from polydraft.text._decoder import Utf8Decoder
from polydraft.text._stops import StopMatcher

if TYPE_CHECKING:
    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["OutputTracker", "TextDelta"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that became stable: it will not change, nor be taken back by a stop string."""

    text: str
    segments: tuple[Segment, ...]
    thinking: str
    tool_calls: tuple[ToolCall, ...]


@dataclass(slots=True)
class _Piece:
    """Decoded text of one token (of one part); ``visible`` is False for special tokens and brackets."""

    text: str
    part: Part
    is_draft: bool
    visible: bool
    ends_call: bool = False
    opens_channel: bool = False


class OutputTracker:
    """Told each emitted token in order; says when the generation ends, and gives the text in stable pieces.

    The raw rendering is every token's text, special tokens by their names; stop strings are looked for there. The text
    of the answer is the raw rendering without special tokens, thinking and tool calls, up to a stop string's begin.

    Args:
        tokenizer: The target's.
        request: Limits, stops and the prompt.
        parse_chat: Whether thinking and tool calls are parsed apart.
    """

    def __init__(self, tokenizer: Tokenizer, request: TokenRequest, *, parse_chat: bool) -> None:
        self._tokenizer = tokenizer
        self._settings = request.settings
        self._eos = request.eos_token_ids
        self._stop_ids = frozenset(request.settings.stop_token_ids)
        self._room = request.max_total_tokens - len(request.prompt_token_ids)
        self._special = tokenizer.special_token_ids
        self._decoder = Utf8Decoder()
        self._stops = StopMatcher(request.settings.stop)
        self._parser = ChatParser(tokenizer, request.prompt_token_ids) if parse_chat else None
        self._ids: list[int] = []
        self._raw: list[str] = []
        self._pending: deque[_Piece] = deque()
        self._pending_length = 0
        self._stable: list[tuple[str, bool]] = []
        self._stable_thinking: list[str] = []
        self._stable_calls: list[ToolCall] = []
        self._call: list[_Piece] = []
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[ToolCall] = []
        self._channel_line = False
        self.stop_match: str | int | None = None
        self.finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All emitted tokens."""
        return tuple(self._ids)

    @property
    def text(self) -> str:
        """The answer as far as it has been taken."""
        return "".join(self._text)

    @property
    def raw_text(self) -> str:
        """All emitted tokens as text."""
        return "".join(self._raw)

    @property
    def thinking(self) -> str:
        """The thoughts as far as they have been taken."""
        return "".join(self._thinking)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls completed so far."""
        return tuple(self._calls)

    def push(self, token_id: int, *, is_draft: bool) -> FinishReason | None:
        """Follow one more token.

        Returns:
            Why the generation ends with this token; None if it goes on.
        """
        self._ids.append(token_id)
        count = len(self._ids)
        matched = self._add_text(token_id, is_draft)
        if count > self._settings.min_new_tokens:
            if token_id in self._eos or token_id in self._stop_ids:
                self.stop_match = token_id
                self.finish_reason = "eos" if token_id in self._eos else "stop"
                return self.finish_reason
            if matched is not None:
                behind, self.stop_match = matched
                self._cut(behind)
                self.finish_reason = "stop"
                return "stop"
        if count >= self._settings.max_new_tokens:
            self.finish_reason = "length"
        elif count >= self._room:
            self.finish_reason = "context"
        return self.finish_reason

    def take(self) -> TextDelta:
        """Text that became stable since the last call."""
        self._settle(self._stops.held() if self._settings.stop else 0)
        return self._delta()

    def finish(self, reason: FinishReason | None = None) -> TextDelta:
        """All text that is left. Gives ``finish_reason`` a value if no token ended the generation."""
        if self.finish_reason is None:
            self.finish_reason = reason
        rest = self._decoder.flush()
        if rest:
            self._raw.append(rest)
            if self.finish_reason != "stop" or not isinstance(self.stop_match, str):
                part: Part = self._parser.part if self._parser else "answer"
                self._append(_Piece(rest, part, is_draft=False, visible=True))
        self._settle(0)
        self._give_up_call()
        return self._delta()

    def _add_text(self, token_id: int, is_draft: bool) -> tuple[int, str] | None:
        special = token_id in self._special
        before: Part = self._parser.part if self._parser else "answer"
        bracket = self._parser is not None and self._parser.step(token_id)
        data = self._tokenizer.token_bytes(token_id)
        text = ""
        if special or bracket:
            # A special token's name never joins an unfinished character before it.
            text = self._decoder.flush()
            if text:
                self._append(_Piece(text, before, is_draft=is_draft, visible=True))
            self._decoder = Utf8Decoder()
        decoded = self._decoder.feed(data)
        if bracket:
            assert self._parser is not None
            piece = _Piece(decoded, before, is_draft, visible=False)
            piece.ends_call = before == "tool_call"
            piece.opens_channel = self._parser.names_channel
            self._append(piece)
        else:
            # Inside a call the quote token is a part of the call's text.
            self._append(_Piece(decoded, before, is_draft, visible=not special or before == "tool_call"))
        self._raw.append(text + decoded)
        return self._stops.feed(text + decoded)

    def _append(self, piece: _Piece) -> None:
        self._pending.append(piece)
        self._pending_length += len(piece.text)

    def _cut(self, behind: int) -> None:
        """Drop the last ``behind`` characters of the raw rendering from what is pending."""
        while behind > 0 and self._pending:
            piece = self._pending.pop()
            self._pending_length -= len(piece.text)
            if len(piece.text) > behind:
                piece.text = piece.text[: len(piece.text) - behind]
                piece.ends_call = piece.opens_channel = False
                self._append(piece)
                return
            behind -= len(piece.text)

    def _settle(self, held: int) -> None:
        """Make all but the last ``held`` raw characters stable."""
        while self._pending:
            piece = self._pending[0]
            free = self._pending_length - held
            if free <= 0 and piece.text:
                return
            if len(piece.text) > free:
                part = _Piece(piece.text[:free], piece.part, piece.is_draft, piece.visible)
                piece.text = piece.text[free:]
                self._pending_length -= free
                self._route(part)
                return
            self._pending.popleft()
            self._pending_length -= len(piece.text)
            self._route(piece)

    def _route(self, piece: _Piece) -> None:
        if piece.opens_channel:
            self._channel_line = True
        if piece.part == "tool_call":
            if piece.ends_call:
                self._end_call()
            elif piece.visible and piece.text:
                self._call.append(piece)
        elif not piece.visible or not piece.text:
            return
        elif piece.part == "thinking":
            self._route_thinking(piece.text)
        else:
            self._stable.append((piece.text, piece.is_draft))

    def _route_thinking(self, text: str) -> None:
        if self._channel_line:  # "thought\n" names the channel
            _, newline, text = text.partition("\n")
            if not newline:
                return
            self._channel_line = False
        self._stable_thinking.append(text)

    def _end_call(self) -> None:
        raw = "".join(piece.text for piece in self._call)
        call = parse_tool_call(raw)
        if call is None:
            self._give_up_call()
            return
        self._call = []
        self._stable_calls.append(call)

    def _give_up_call(self) -> None:
        """A malformed or unfinished call is text: nothing that the model wrote is lost."""
        self._stable.extend((piece.text, piece.is_draft) for piece in self._call)
        self._call = []

    def _delta(self) -> TextDelta:
        segments: list[Segment] = []
        for text, is_draft in self._stable:
            if segments and segments[-1].is_draft == is_draft:
                segments[-1] = Segment(text=segments[-1].text + text, is_draft=is_draft)
            else:
                segments.append(Segment(text=text, is_draft=is_draft))
        delta = TextDelta(
            "".join(text for text, _ in self._stable),
            tuple(segments),
            "".join(self._stable_thinking),
            tuple(self._stable_calls),
        )
        self._text.append(delta.text)
        self._thinking.append(delta.thinking)
        self._calls.extend(delta.tool_calls)
        self._stable, self._stable_thinking, self._stable_calls = [], [], []
        return delta
