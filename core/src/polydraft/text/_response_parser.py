"""Thinking and tool calls as the checkpoint's own ``response_template`` describes them.

As Transformers' ``parse_response``, with these differences, all of which keep what the model wrote:

- Names of tokens in the template match only the tokens themselves.
- A tool call inside thinking that was not closed is a tool call.
- What ends a call has no effect inside one of its strings.
- A call that is malformed, or not closed though the template says what closes it, is text; Transformers raises an
  error, or guesses.
- Several regions of content are joined, as what has been streamed cannot be taken back; Transformers keeps the last.
- Fields that a result has no place for are in ``raw_text`` only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polydraft.text._call_values import StringFollower, map_texts, strict_json
from polydraft.text._chat_parser import Piece, Sink, call_of
from polydraft.text._response_template import SECONDS, Anchor, Field, ResponseTemplate, slow_pattern

if TYPE_CHECKING:
    import regex

    from polydraft.contract.results import ToolCall

__all__ = ["ResponseParser"]

_CONTEXT = 256  # characters before the place of a search that its pattern can see
_FIRST_OTHER, _LAST_MARK = 0xDC00, 0xDFFF  # marks of special tokens that the template does not name

# Where text comes from: None: the prompt, else whether it was drafted.
Run = tuple[str, bool | None]


class _Text:
    """Text of the answer or of the thinking, without the white space around it."""

    def __init__(self) -> None:
        self._space: list[Run] = []
        self._begun = False
        self._join: str | None = None

    def feed(self, runs: Sequence[Run], *, strip: bool) -> list[tuple[str, bool]]:
        """What is certain to be text once these runs follow; white space waits for what comes after it."""
        found: list[Run] = []
        for text, origin in runs:
            begins = strip and not self._begun
            rest = text.lstrip() if begins else text
            kept = rest.rstrip() if strip else rest
            if kept and self._join is not None:
                found.append((self._join, origin))
                kept = kept.lstrip()
            elif kept:
                found += self._space
            if kept:
                found.append((kept, origin))
                self._join, self._begun, self._space = None, True, []
                rest = rest[len(rest.rstrip()) :] if strip else ""
            if rest:
                self._space.append((rest, origin))
        return [(text, origin) for text, origin in found if origin is not None]

    def end_region(self, join: str | None) -> None:
        """A region ends: the next one is joined with ``join``, if the template has it."""
        if join is not None and self._begun:
            self._join, self._space = join, []


class ResponseParser:
    """Sorts the pieces of one answer into a ``Sink``; used like ``ChatParser``.

    Args:
        template: The checkpoint's template.
        prompt_token_ids: The prompt, which may hold the start of the message.
        tools: The tools of the prompt. Arguments that the model wrote as text are converted to the types in their
            schemas: some formats have no other values than text.
    """

    def __init__(
        self, template: ResponseTemplate, prompt_token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.sink = Sink()
        self._template = template
        self._name = template.tokenizer.token_bytes
        self._special = template.tokenizer.special_token_ids
        self.marks = self._special | frozenset(template.marks)
        self._mark_of = dict(template.marks)
        self._tokens = {mark: token_id for token_id, mark in self._mark_of.items()}  # mark -> token id
        self._properties = {tool["function"]["name"]: _properties(tool["function"]) for tool in tools}
        self._buffer, self._at = "", 0
        self._runs: deque[Run] = deque()  # the buffer from ``_at``, by origin
        self._implicit = next((one for one in template.fields if one.open is None), None)
        self._field = self._implicit
        self._opened: regex.Match[str] | None = None
        self._texts = {"text": _Text(), "thinking": _Text()}
        self._head: list[Run] = []  # what opened the call
        self._body: list[Run] = []  # of a field that is parsed when it ends
        self._strings: StringFollower | None = None
        self._follow_strings = True
        self._inner: tuple[int, int] | None = None  # where the first closing text inside a string lies in the body
        self._failed = False
        self._read_prompt(prompt_token_ids)

    # What comes in -----------------------------------------------------------------------------------------------

    def feed(self, piece: Piece) -> None:
        """Sort one piece."""
        text = piece.text if piece.token_id not in self.marks else self._mark(piece.token_id) if piece.whole else ""
        if text:
            self._append(text, piece.is_draft)
            self._process(ended=False)

    def finish(self) -> None:
        """Nothing follows: sort what was kept back."""
        self._process(ended=True)

    def _append(self, text: str, origin: bool | None) -> None:
        if self._at > 4096:
            self._buffer, self._at = self._buffer[self._at - _CONTEXT :], _CONTEXT
        self._buffer += text
        self._runs.append((text, origin))

    def _mark(self, token_id: int | None) -> str:
        """One character that stands for the token."""
        assert token_id is not None
        mark = self._mark_of.get(token_id)
        if mark is None:
            number = _FIRST_OTHER + len(self._mark_of) - len(self._template.marks)
            if number > _LAST_MARK:
                return ""  # an answer with more than 1,024 different special tokens
            mark = self._mark_of[token_id] = chr(number)
            self._tokens[mark] = token_id
        return mark

    def _read_prompt(self, token_ids: Sequence[int]) -> None:
        """Read the part of the message that the prompt holds."""
        parts: list[str] = []
        run = b""
        for token_id in token_ids:
            if token_id in self.marks:
                parts += [run.decode("utf-8", "replace"), self._mark(token_id)]
                run = b""
            else:
                run += self._name(token_id)
        text = "".join([*parts, run.decode("utf-8", "replace")])
        start = 0
        try:
            for match in self._template.start.pattern.finditer(text, timeout=SECONDS):
                start = match.end()
        except TimeoutError:
            raise slow_pattern() from None
        if text[start:]:
            self._append(text[start:], None)
            self._process(ended=False)

    # Regions -----------------------------------------------------------------------------------------------------

    def _process(self, *, ended: bool) -> None:
        stuck = 0
        while not self._failed:
            found, hold = self._scan(ended=ended)
            if found is None:
                self._take(len(self._buffer) if ended else hold)
                if ended and self._reopen():
                    continue
                break
            field, match, opens = found
            before = self._at
            self._take(match.start())
            if opens:
                self._end_region(closed=False)
                self._begin(field, match)
            elif not self._in_string(match):
                self._end_region(closed=True, tail=self._cut(match.end()), captures=match.groupdict())
            stuck = 0 if self._at > before else stuck + 1
            if stuck > 2:  # patterns that match without text take turns: let one character pass
                if self._at == len(self._buffer):
                    break
                self._take(self._at + 1)
        if self._failed:
            self._take(len(self._buffer))
        if ended:
            self._end_region(closed=False)

    def _watched(self) -> list[tuple[Field, Anchor, bool]]:
        """(field, anchor, whether it opens the field) of all that can come next."""
        field = self._field
        closing = [(field, field.close, False)] if field is not None and field.close is not None else []
        opening = [(one, one.open, True) for one in self._template.fields if one.open is not None]
        if field is None or field is self._implicit:
            return [*opening, *closing]
        if field.kind == "thinking":  # a call ends thinking, if it begins with a token and not with mere text
            return [*closing, *(entry for entry in opening if entry[0].kind == "calls" and entry[1].has_mark)]
        return closing

    def _scan(self, *, ended: bool) -> tuple[tuple[Field, regex.Match[str], bool] | None, int]:
        """The first anchor that is certain, and the place from which text may still become one."""
        best: tuple[Field, regex.Match[str], bool] | None = None
        hold = len(self._buffer)
        for field, anchor, opens in self._watched():
            try:
                match = anchor.pattern.search(self._buffer, self._at, partial=not ended, timeout=SECONDS)
            except TimeoutError:
                self._failed = True  # what follows is text, should the caller go on
                raise slow_pattern() from None
            if match is None:
                continue
            at_edge = match.end() == len(self._buffer)
            if not ended and (match.partial or (at_edge and (not match[0] or anchor.can_grow(match[0])))):
                hold = min(hold, match.start())
            elif best is None or _order(match, opens, field) < _order(best[1], best[2], best[0]):
                best = field, match, opens
        if best is not None and not ended and best[1].start() >= hold:
            best = None
        return best, hold

    def _take(self, end: int) -> None:
        """The text up to ``end`` belongs to the region that is open."""
        runs = self._cut(end)
        field = self._field
        if self._failed:
            self._show(runs)
        elif field is None or not runs:
            return
        elif field.kind == "text":
            self.sink.answer += self._texts["text"].feed(self._clean(runs), strip=field.strip)
        elif field.kind == "thinking":
            thinking = self._texts["thinking"].feed(self._clean(runs), strip=field.strip)
            self.sink.thinking += [text for text, _ in thinking]
        elif field.kind == "calls":
            self._body += runs
            if self._strings is not None:
                self._strings.feed("".join(text for text, _ in runs))

    def _cut(self, end: int) -> list[Run]:
        """Remove the text up to ``end`` from the buffer."""
        count, runs = end - self._at, []
        self._at = max(self._at, end)
        while count > 0:
            text, origin = self._runs.popleft()
            if len(text) > count:
                self._runs.appendleft((text[count:], origin))
            runs.append((text[:count], origin))
            count -= len(text)
        return runs

    def _begin(self, field: Field, match: regex.Match[str]) -> None:
        self._field, self._opened = field, match
        self._head = self._cut(match.end())
        if field.kind == "calls" and field.holds_json and self._follow_strings:
            self._strings = StringFollower({one: end for one, end in field.quotes if len(one) == len(end) == 1})

    def _in_string(self, match: regex.Match[str]) -> bool:
        """Whether the closing text lies inside a string of the call; if so, it is a part of the string."""
        if self._strings is None or not self._strings.inside or match.start() == match.end():
            return False
        if self._inner is None:
            start = sum(len(text) for text, _ in self._body)
            self._inner = start, start + len(match[0])
        self._take(match.end())
        return True

    def _reopen(self) -> bool:
        """At the end of the output: if a string of a call was never closed, the closing text inside it closed the call.

        Returns:
            Whether there is text after it to be sorted again.
        """
        if self._inner is None or self._field is None:
            return False
        start, end = self._inner
        body, tail, rest = _slice(self._body, 0, start), _slice(self._body, start, end), _slice(self._body, end, None)
        self._body, self._strings, self._follow_strings, self._inner = body, None, False, None
        self._end_region(closed=True, tail=tail)
        self._buffer, self._at = "".join(text for text, _ in rest), 0
        self._runs = deque(rest)
        return True

    def _end_region(self, *, closed: bool, tail: Sequence[Run] = (), captures: Mapping[str, Any] | None = None) -> None:
        field = self._field
        if field is not None and field.kind == "calls":
            calls = self._calls(field, closed=closed or field.close is None, captures=captures or {})
            self.sink.calls += calls
            if not calls:
                self._show([*self._head, *self._body, *tail])
        elif field is not None and field.kind in self._texts:
            self._texts[field.kind].end_region(field.join)
        self._field, self._opened, self._strings, self._inner = self._implicit, None, None, None
        self._head, self._body = [], []

    def _show(self, runs: Sequence[Run]) -> None:
        """Text that turned out to be no call."""
        quotes = frozenset("".join(one for pair in self._field.quotes for one in pair)) if self._field else frozenset()
        self.sink.answer += self._texts["text"].feed(self._clean(runs, quotes), strip=False)

    # Marks and values --------------------------------------------------------------------------------------------

    def _clean(self, runs: Sequence[Run], kept: frozenset[str] = frozenset()) -> list[Run]:
        """The runs without special tokens, but those whose marks are ``kept``; others are shown by their names."""
        hidden = {mark for mark, token_id in self._tokens.items() if token_id in self._special} - kept
        return [(self._named("".join(one for one in text if one not in hidden)), origin) for text, origin in runs]

    def _named(self, text: str) -> str:
        """The text with the names of tokens for their marks."""
        if not any(character in self._tokens for character in text):
            return text
        names = {mark: self._name(token_id).decode("utf-8", "replace") for mark, token_id in self._tokens.items()}
        return "".join(names.get(one, one) for one in text)

    def _calls(self, field: Field, *, closed: bool, captures: Mapping[str, Any]) -> list[ToolCall]:
        """The calls that a region holds; none if it is malformed."""
        body = "".join(text for text, _ in self._body)
        opened = self._opened.groupdict() if self._opened is not None else {}
        groups = {name: text for name, text in {**opened, **captures}.items() if text is not None}
        written = "".join(text for text, _ in self._head) + body
        raw = self._named(written.strip("".join(self._tokens) + " \n"))
        try:
            if not closed:
                return []
            found = map_texts(field.value(body, groups), self._named)
            return [self._typed(call_of(one, raw)) for one in (found if isinstance(found, list) else [found])]
        except (ValueError, IndexError, KeyError, TypeError, RecursionError):
            return []

    def _typed(self, call: ToolCall) -> ToolCall:
        properties = self._properties.get(call.name, {})
        arguments = {
            name: _typed(value, _types(properties.get(name))) if isinstance(value, str) else value
            for name, value in call.arguments.items()
        }
        return call.model_copy(update={"arguments": arguments})


def _order(match: regex.Match[str], opens: bool, field: Field) -> tuple[int, int, bool, str]:
    """The first, of these the longest; what opens a field comes before what closes one."""
    return match.start(), match.start() - match.end(), not opens, field.name


def _slice(runs: Sequence[Run], start: int, end: int | None) -> list[Run]:
    found, at = [], 0
    for text, origin in runs:
        part = text[max(start - at, 0) : None if end is None else max(end - at, 0)]
        if part:
            found.append((part, origin))
        at += len(text)
    return found


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _types(schema: Any, depth: int = 0) -> list[str]:
    """The types that a JSON schema allows."""
    if not isinstance(schema, Mapping) or depth > 10:
        return []
    declared = schema.get("type")
    types = [declared] if isinstance(declared, str) else [one for one in declared or () if isinstance(one, str)]
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            types += _types(choice, depth + 1)
    return [*types, "null"] if schema.get("nullable") else types


_CONSTANTS = {"true": True, "1": True, "false": False, "0": False}
_KINDS: dict[str, type | tuple[type, ...]] = {"integer": int, "number": (int, float), "object": dict, "array": list}


def _typed(text: str, types: Sequence[str]) -> Any:
    """The value of the first of the types, other than text, that the text can stand for; else the text."""
    word = text.strip()
    for name in types:
        if name == "boolean" and word.lower() in _CONSTANTS:
            return _CONSTANTS[word.lower()]
        if name == "null" and word in ("null", "None"):
            return None
        if name not in _KINDS:
            continue
        try:
            value = strict_json(word)
        except (ValueError, RecursionError):
            continue
        if name == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, _KINDS[name]) and not isinstance(value, bool):
            return value
    return text
