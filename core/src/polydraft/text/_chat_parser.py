r"""Thinking and tool calls of chat models, separated by token ids.

Ids, not text: a chunk may hold any number of tokens, and text can be cut anywhere (vllm#42781, #41967, #45588); and
text that spells a bracket is text. Gemma 4: ``<|channel>thought\n...<channel|>`` and
``<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>`` (ai.google.dev, "Gemma 4 prompt formatting"). Others:
``<think>...</think>``, ``[THINK]...[/THINK]`` and ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. What a
checkpoint itself says about its format comes first (``_response_parser.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from polydraft.contract.requests import Thought
from polydraft.contract.results import ToolCall
from polydraft.errors import UnsupportedError
from polydraft.text._call_values import QUOTES, StringFollower, map_texts, strict_json, value_at

if TYPE_CHECKING:
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["ChatParser", "Piece", "Sink", "call_of", "marks_of", "parse_tool_calls", "thought_of"]

Part = Literal["answer", "thinking", "tool_call"]

# (opening token, closing token, what lies between, whether a first line names the channel)
_BRACKETS: tuple[tuple[str, str, Part, bool], ...] = (
    ("<|channel>", "<channel|>", "thinking", True),
    ("<think>", "</think>", "thinking", False),
    ("[THINK]", "[/THINK]", "thinking", False),
    ("<|tool_call>", "<tool_call|>", "tool_call", False),
    ("<tool_call>", "</tool_call>", "tool_call", False),
)
# Half of a surrogate pair, which decoded text never holds, stands for the quotation mark that is a token.
_QUOTE_TOKEN = "\ud800"
_QUOTE_TOKENS = ((_QUOTE_TOKEN, _QUOTE_TOKEN),)
_CALL = re.compile(r"""\s*call:\s*([^\s{}\[\]()<>"',\ud800]+)\s*""")
_CHANNEL_NAME = re.compile(r"\s*\w*\s*")


class Piece(NamedTuple):
    """Decoded text of one token, or a part of it."""

    text: str
    token_id: int | None  # None: bytes of a character that was never finished
    is_draft: bool
    whole: bool  # whether the token's text ends with this piece


class Sink:
    """What became stable: text of the answer (with whether it was drafted), thinking, tool calls."""

    def __init__(self) -> None:
        self.answer: list[tuple[str, bool]] = []
        self.thinking: list[str] = []
        self.calls: list[ToolCall] = []

    def clear(self) -> None:
        """Forget what has been taken."""
        self.answer, self.thinking, self.calls = [], [], []


class ChatParser:
    """Sorts the pieces of one answer into a ``Sink``.

    A tool call may start inside thinking, and ends it, as in vLLM. A closing token inside a string of a call does not
    end the call. A call that is malformed or unfinished is text: nothing that the model wrote is lost.

    Args:
        tokenizer: Formats whose tokens it lacks are ignored.
        prompt_token_ids: If the prompt ends inside thinking, the answer starts there. An opening token that a message
            merely mentions has no effect, since the special tokens that end the message close it.
        parse_chat: False: everything is the answer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, parse_chat: bool = True) -> None:
        self.sink = Sink()
        self._special = tokenizer.special_token_ids
        self._name = tokenizer.token_bytes
        self._opening: dict[int, tuple[int, Part, bool]] = {}
        for opening, closing, part, named in _BRACKETS if parse_chat else ():
            begin, end = tokenizer.token_id(opening), tokenizer.token_id(closing)
            if begin is not None and end is not None and begin != end:
                self._opening[begin] = (end, part, named)
        self._quote = tokenizer.token_id(QUOTES[0][0]) if self._opening else None
        self.marks = frozenset(self._opening) | {end for end, *_ in self._opening.values()}
        """Tokens whose names never join the text around them, besides the special ones."""
        self._part: Part = "answer"
        self._closing: int | None = None
        self._line: str | None = None  # of thinking whose first line, which may name the channel, has not ended
        self._call: list[tuple[str, Piece]] = []  # the open call: text with ``_QUOTE_TOKEN``, and what it comes from
        self._strings = StringFollower(dict(_QUOTE_TOKENS))
        self._follow_strings = True
        self._enter(tokenizer, prompt_token_ids)

    def _enter(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        """Start inside thinking if the prompt ends there."""
        closing = {end for end, *_ in self._opening.values()}
        line_ended = False
        for token_id in reversed(prompt_token_ids if self._opening else ()):
            found = self._opening.get(token_id)
            if found is not None and found[1] == "thinking":
                self._closing, self._part, named = found
                self._line = "" if named and not line_ended else None
                return
            if token_id in closing or token_id in self._special or found is not None:
                return
            line_ended = line_ended or b"\n" in tokenizer.token_bytes(token_id)

    def feed(self, piece: Piece) -> None:
        """Sort one piece."""
        token_id = piece.token_id
        if token_id is not None and self._acts(token_id):
            if piece.whole:  # a bracket that a stop string cuts has no effect
                self._act(token_id)
        elif self._part == "tool_call":
            self._feed_call(piece)
        elif token_id not in self._special and piece.text:
            if self._part == "thinking":
                self._feed_thinking(piece.text)
            else:
                self.sink.answer.append((piece.text, piece.is_draft))

    def finish(self) -> None:
        """Nothing follows: sort what was kept back."""
        end = self._closing
        if self._part == "tool_call" and end is not None:
            inner = (at for at, (_, piece) in enumerate(self._call) if piece.token_id == end and piece.whole)
            at = next(inner, None)
            if at is not None:  # a string was never closed, so the token inside it did end the call
                rest = [piece for _, piece in self._call[at + 1 :]]
                del self._call[at:]
                self._follow_strings = False
                self._strings = StringFollower({})
                self._act(end)
                for piece in rest:
                    self.feed(piece)
        self._give_up_call()
        self._end_line()

    def _acts(self, token_id: int) -> bool:
        """Whether the token is a bracket here."""
        if self._part == "answer":
            return token_id in self._opening
        if token_id != self._closing and self._opening.get(token_id, (0, ""))[1] != "tool_call":
            return False
        return not self._strings.inside

    def _act(self, token_id: int) -> None:
        found = self._opening.get(token_id) if token_id != self._closing else None
        self._end_line()
        if self._part == "tool_call":
            self._end_call(token_id)
        self._part, self._closing = "answer", None
        if found is not None:
            self._closing, self._part, named = found
            self._line = "" if named else None
            if self._part == "tool_call":
                self._call = [("", piece) for piece in self._shown(token_id)]

    def _shown(self, token_id: int) -> list[Piece]:
        """A bracket as text, for a call that turns out to be none: special tokens are never text."""
        name = "" if token_id in self._special else self._name(token_id).decode("utf-8", "replace")
        return [Piece(name, None, is_draft=False, whole=True)] if name else []

    def _feed_thinking(self, text: str) -> None:
        if self._line is None:
            self.sink.thinking.append(text)
            return
        # The first newline may come several tokens later.
        self._line, newline, rest = (self._line + text).partition("\n")
        if newline:
            self._end_line(newline)
            self.sink.thinking.append(rest)

    def _end_line(self, newline: str = "") -> None:
        """Drop the first line if it is the channel's name, such as "thought"."""
        if self._line is not None and not _CHANNEL_NAME.fullmatch(self._line):
            self.sink.thinking.append(self._line + newline)
        self._line = None

    def _feed_call(self, piece: Piece) -> None:
        text = piece.text
        if piece.token_id == self._quote is not None:
            text = _QUOTE_TOKEN if piece.whole else ""
        if self._follow_strings:
            self._strings.feed(text)
        self._call.append((text, piece))

    def _end_call(self, token_id: int) -> None:
        text = "".join(text for text, _ in self._call)
        calls = parse_tool_calls(text, QUOTES if self._quote is None else _QUOTE_TOKENS)
        if calls:
            self.sink.calls += calls
            self._call = []
        elif token_id == self._closing:
            self._call += [("", piece) for piece in self._shown(token_id)]
        self._give_up_call()

    def _give_up_call(self) -> None:
        """Treat a malformed or unfinished call as text."""
        self.sink.answer += [(piece.text, piece.is_draft) for _, piece in self._call if piece.text]
        self._call, self._strings = [], StringFollower(dict(_QUOTE_TOKENS))


def marks_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The model's tokens that delimit thoughts, calls and strings inside calls: what they spell is no text."""
    names = [name for opening, closing, *_ in _BRACKETS for name in (opening, closing)]
    found = (tokenizer.token_id(name) for name in (*names, *QUOTES[0]))
    return frozenset(token_id for token_id in found if token_id is not None)


def thought_of(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, expected: bool) -> Thought | None:
    """The thought that an answer begins with, if the prompt ends inside it or if one is ``expected``.

    Raises:
        UnsupportedError: One is expected, and the model has none of the tokens that delimit thoughts.
    """
    parser = ChatParser(tokenizer, prompt_token_ids)
    pairs = [(begin, end) for begin, (end, part, _) in parser._opening.items() if part == "thinking"]
    for begin, end in pairs:
        if parser._part == "thinking" and parser._closing == end:
            return Thought(open=begin, close=end, begun=True)
    if not expected:
        return None
    if not pairs:
        raise UnsupportedError(
            "The model is to think before an answer that must match, and polydraft does not know the tokens that "
            "delimit its thoughts.",
            "Turn thinking off in `chat_template_kwargs`.",
        )
    return Thought(open=pairs[0][0], close=pairs[0][1], begun=False)


def parse_tool_calls(raw: str, quotes: Sequence[tuple[str, str]] = QUOTES) -> list[ToolCall]:
    """The calls that ``raw``, the text between two tool-call tokens, holds; none if it is malformed."""
    match = _CALL.match(raw)
    try:
        if match is None:
            found = strict_json(raw)
        else:
            value, end = value_at(raw, match.end(), quotes)
            if raw[end:].strip():
                return []
            found = {"name": match[1], "arguments": value}
        found = map_texts(found if isinstance(found, list) else [found], _written)
        return [call_of(one, _written(raw)) for one in found]
    except (ValueError, IndexError, RecursionError):
        return []


def call_of(value: Any, raw: str) -> ToolCall:
    """The call that parsed data stands for; its arguments may be JSON text.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(raw)
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = strict_json(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(raw)
    return ToolCall(name=name, arguments=arguments, raw=raw)


def _written(text: str) -> str:
    return text.replace(_QUOTE_TOKEN, QUOTES[0][0])
