"""Track the emitted tokens of one generation: when it ends, and its text."""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from polydraft.contract.results import FinishReason, Segment, ToolCall
from polydraft.text._chat_parser import ChatParser, Part, parse_tool_call
from polydraft.text._stops import StopMatcher

if TYPE_CHECKING:
    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.tokenizer import Tokenizer

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
    """Gets each emitted token in order, decides when the generation ends, and releases text once it is stable.

    The raw text is every token's text, special tokens by name; stop strings are matched in it. The answer is the raw
    text without special tokens, thinking and tool calls, up to the start of a stop string.

    Args:
        tokenizer: The target's tokenizer.
        request: Its limits, stops and prompt are used.
        parse_chat: Whether to separate thinking and tool calls from the answer.
    """

    def __init__(self, tokenizer: Tokenizer, request: TokenRequest, *, parse_chat: bool) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        """Ids of emitted tokens lie below it."""
        self._settings = request.settings
        self._eos = request.eos_token_ids
        self._ends = request.eos_token_ids | frozenset(request.settings.stop_token_ids)
        self._room = request.max_total_tokens - len(request.prompt_token_ids)
        self._special = tokenizer.special_token_ids
        self._decoder = _utf8_decoder()
        self._stops = StopMatcher(request.settings.stop)
        self._parser = ChatParser(tokenizer, request.prompt_token_ids) if parse_chat else None
        self._ids: list[int] = []
        self._raw: list[str] = []
        self._pending: deque[_Piece] = deque()  # decoded since the last delta, or held back by it
        self._held: deque[_Piece] = deque()  # may become a stop string
        self._stable: list[tuple[str, bool]] = []  # the next delta's answer: (text, whether drafted)
        self._stable_thinking: list[str] = []  # the next delta's thinking
        self._stable_calls: list[ToolCall] = []  # the next delta's tool calls
        self._call: list[_Piece] = []  # of the tool call that is open
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
    def num_tokens(self) -> int:
        """Number of emitted tokens."""
        return len(self._ids)

    @property
    def text(self) -> str:
        """The answer, as far as it is stable."""
        return "".join(self._text)

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
                part: Part = self._parser.part if self._parser else "answer"
                self._pending.append(_Piece(rest, part, is_draft=False, visible=True))
        return self._stable_text(held=0, ended=True)

    def _add_text(self, token_id: int, is_draft: bool) -> tuple[int, str] | None:
        """Append the token's text to what is pending. Returns what ``StopMatcher.feed`` found in it."""
        special = token_id in self._special
        part: Part = self._parser.part if self._parser else "answer"
        # ``part`` is read before this step: for a closing bracket it is the part that ends here.
        bracket = self._parser is not None and self._parser.step(token_id)
        unfinished = ""
        if special or bracket:
            # A special token's name never joins an unfinished character before it.
            unfinished = self._decoder.decode(b"", final=True)
            if unfinished:
                self._pending.append(_Piece(unfinished, part, is_draft, visible=True))
            self._decoder = _utf8_decoder()
        spelled = self._tokenizer.token_bytes(token_id)
        if not isinstance(spelled, bytes):
            raise TypeError(f"the tokenizer's token_bytes({token_id}) gave a {type(spelled).__name__}, not bytes")
        text = self._decoder.decode(spelled)
        # Inside a call the quote token is a part of the call's text.
        piece = _Piece(text, part, is_draft, visible=not bracket and (not special or part == "tool_call"))
        if bracket:
            assert self._parser is not None
            piece.ends_call = part == "tool_call"
            piece.opens_channel = self._parser.names_channel
        self._pending.append(piece)
        self._raw.append(unfinished + text)
        return self._stops.feed(unfinished + text) if self._settings.stop else None

    def _cut(self, past: int) -> None:
        """Drop the last ``past`` characters of the raw text from what is pending."""
        while past > 0 and self._pending:
            piece = self._pending.pop()
            if len(piece.text) > past:
                piece.text = piece.text[: len(piece.text) - past]
                # A bracket that is cut has no effect: its call stays unfinished.
                piece.ends_call = piece.opens_channel = False
                self._pending.append(piece)
                return
            past -= len(piece.text)

    def _stable_text(self, held: int, *, ended: bool = False) -> TextDelta:
        """Make all pending text stable, except the last ``held`` characters, which may become a stop string."""
        if held:
            self._hold(held)
        while self._pending:
            piece = self._pending.popleft()
            # The bracket that opens a channel still has the part before it, which is the answer.
            if piece.part != "answer" or piece.opens_channel:
                self._route(piece)
            elif piece.visible and piece.text:
                self._stable.append((piece.text, piece.is_draft))
        # Before the delta is built, since an unfinished call becomes part of its text.
        if ended:
            self._give_up_call()
        # What was held is pending for the next call; the emptied deque is used again.
        self._pending, self._held = self._held, self._pending
        segments = tuple(
            Segment(text="".join(text for text, _ in group), is_draft=is_draft)
            for is_draft, group in groupby(self._stable, key=itemgetter(1))
        )
        delta = TextDelta(
            "".join(text for text, _ in self._stable),
            segments,
            "".join(self._stable_thinking),
            tuple(self._stable_calls),
        )
        self._text.append(delta.text)
        self._thinking.append(delta.thinking)
        self._calls.extend(delta.tool_calls)
        self._stable, self._stable_thinking, self._stable_calls = [], [], []
        return delta

    def _hold(self, held: int) -> None:
        """Move the last ``held`` pending characters to the pieces held for the next call."""
        while held > 0 and self._pending:
            piece = self._pending.pop()
            if len(piece.text) > held:
                # Split: only the second half may be a stop string; it keeps the marks of a bracket.
                start = _Piece(piece.text[: len(piece.text) - held], piece.part, piece.is_draft, piece.visible)
                self._pending.append(start)
                piece.text = piece.text[len(piece.text) - held :]
            held -= len(piece.text)
            # Pieces come from the end of the text backwards.
            self._held.appendleft(piece)

    def _route(self, piece: _Piece) -> None:
        """Collect a piece of thinking or of a tool call."""
        if piece.opens_channel:
            self._channel_line = True
        if piece.part == "tool_call":
            if piece.ends_call:
                self._end_call()
            elif piece.visible and piece.text:
                self._call.append(piece)
        elif piece.part == "thinking" and piece.visible and piece.text:
            self._route_thinking(piece.text)

    def _route_thinking(self, text: str) -> None:
        if self._channel_line:  # "thought\n" names the channel
            # The first newline may come several tokens later.
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
        """Treat a malformed or unfinished call as text, so that nothing that the model wrote is lost."""
        self._stable.extend((piece.text, piece.is_draft) for piece in self._call)
        self._call = []
