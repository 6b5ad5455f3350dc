"""A checkpoint's own description of its answers: ``response_template`` in its tokenizer_config.json.

Transformers' format, version 1 ("Response parsing" in its documentation): fields of the message, each with what opens
and closes it (texts, or regular expressions), how its content is parsed, and how the parsed content is rearranged.
Names of tokens in it are replaced by marks, one character each, which decoded text never holds: only the tokens
themselves match, and not text that spells them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from polydraft.errors import ModelFormatError
from polydraft.text._call_values import lax_json, strict_json

if TYPE_CHECKING:
    import regex

    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["Anchor", "Field", "ResponseTemplate", "slow_pattern"]

SECONDS = 0.2
"""Time that one search may take. Patterns come from downloaded files, and some need exponential time."""

_LONGEST_PATTERN = 1000
_MOST_MARKS = 1024
_Arguments = Mapping[str, Any]
_FIRST_MARK = 0xD800  # halves of surrogate pairs
_THINKING = ("reasoning_content", "reasoning", "thinking")
_HINT = "Correct the entry response_template in the model's tokenizer_config.json, or remove it."
_HUGE_REPEAT = re.compile(r"\{\d*,?\d{4,}")
_TOKEN_NAME = re.compile(r"<[^<>\s]{1,62}>|\[[^\[\]\s]{1,62}\]")
_ESCAPED = re.compile(r"\\([^\w\s])|\[([^\w\s^\\])\]")
_PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")


@dataclass(frozen=True, slots=True)
class Anchor:
    """What opens or closes a field, or starts a message."""

    pattern: regex.Pattern[str]
    literals: tuple[str, ...]  # empty: a regular expression
    has_mark: bool

    def can_grow(self, found: str) -> bool:
        """Whether more text could change a match that ends where the text ends."""
        if not self.literals:
            return True
        return any(literal != found and literal.startswith(found) for literal in self.literals)


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the message. ``open`` is None for the one that holds all that no other field does."""

    name: str
    kind: str  # "text", "thinking", "calls" or "other"
    open: Anchor | None
    close: Anchor | None
    join: str | None
    strip: bool
    parse: Callable[[str], Any]
    quotes: tuple[tuple[str, str], ...]
    holds_json: bool
    transform: Any
    transform_each: bool

    def value(self, body: str, captures: Mapping[str, str]) -> Any:
        """The parsed and rearranged content.

        Raises:
            ValueError: It cannot be parsed.
        """
        parsed = self.parse(body)
        if self.transform is None:
            return parsed
        if not self.transform_each:
            return _rearranged(self.transform, {**captures, "content": parsed})
        if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
            raise ValueError(parsed)
        return [_rearranged(self.transform, {**captures, **item}) for item in parsed]


@dataclass(frozen=True)
class ResponseTemplate:
    """A checked response template.

    Args:
        spec: The entry of tokenizer_config.json.
        tokenizer: The model's tokenizer: names of its tokens in the template are tokens.

    Raises:
        ModelFormatError: The template is malformed.
    """

    spec: Any
    tokenizer: Tokenizer
    marks: dict[int, str] = field(init=False)
    start: Anchor = field(init=False)
    fields: tuple[Field, ...] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        known = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
        _check_keys("it", spec, known)
        if spec.get("version", 1) != 1:
            _refuse(f"its version is {spec['version']!r}, and polydraft knows version 1")
        fields = spec.get("fields")
        if not isinstance(fields, dict) or not fields:
            _refuse("it has no fields")
        names = _marks(self.tokenizer, list(_texts(spec)))
        start = _anchor("it", spec, "start_anchor", "start_anchor_pattern", names)
        if start is None:
            _refuse("it has no start_anchor")
        built = tuple(_field(name, value, names) for name, value in fields.items())
        if sum(one.open is None for one in built) > 1:
            _refuse("more than one of its fields has no open")
        marks = {found: mark for name, mark in names.items() if (found := self.tokenizer.token_id(name)) is not None}
        for name, value in {"marks": marks, "start": start, "fields": built}.items():
            object.__setattr__(self, name, value)


def slow_pattern() -> ModelFormatError:
    """For a search that took longer than ``SECONDS``."""
    return ModelFormatError(
        f"The model's response_template has a regular expression that takes more than {SECONDS} s to match.", _HINT
    )


def _refuse(reason: str) -> NoReturn:
    raise ModelFormatError(f"The model's response_template is malformed: {reason}.", _HINT)


def _check_keys(scope: str, value: Any, known: set[str]) -> None:
    if not isinstance(value, dict):
        _refuse(f"{scope} is of type {type(value).__name__}")
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        _refuse(f"{scope} has an unknown key {unknown[0]!r}")


def _field(name: str, spec: Any, names: Mapping[str, str]) -> Field:
    scope = f"its field {name!r}"
    known = {"open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join"}
    _check_keys(scope, spec, known | {"optional", "transform", "transform_each"})
    kind = {"content": "text", "tool_calls": "calls"}.get(name, "thinking" if name in _THINKING else "other")
    content, arguments = spec.get("content", "text"), spec.get("content_args", {})
    if content not in _PARSERS or not isinstance(arguments, dict):
        _refuse(f"{scope} has an unknown content parser {content!r}")
    transform, join = spec.get("transform"), spec.get("join")
    if kind in ("text", "thinking") and (content != "text" or transform is not None):
        _refuse(f"{scope} is not plain text, as a stream needs it")
    if not isinstance(join, str | None):
        _refuse(f"{scope} has a join that is not text")
    if any(_PLACEHOLDER.search(text) and not _PLACEHOLDER.fullmatch(text) for text in _texts(transform)):
        _refuse(f"{scope} has a transform that mixes a placeholder with text")
    quotes = _quotes(scope, arguments.get("string_delims", []), names)
    return Field(
        name=name,
        kind=kind,
        open=_anchor(scope, spec, "open", "open_pattern", names),
        close=_anchor(scope, spec, "close", "close_pattern", names),
        join=join,
        strip=bool(arguments.get("strip", True)),
        parse=_PARSERS[content](scope, arguments, quotes, names),
        quotes=quotes,
        holds_json=content == "json",
        transform=transform,
        transform_each=bool(spec.get("transform_each", False)),
    )


def _anchor(scope: str, spec: Mapping[str, Any], literal: str, pattern: str, names: Mapping[str, str]) -> Anchor | None:
    import regex

    if literal in spec and pattern in spec:
        _refuse(f"{scope} has both {literal} and {pattern}")
    if literal in spec:
        texts = [spec[literal]] if isinstance(spec[literal], str) else spec[literal]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            _refuse(f"{scope} has a {literal} that is neither a text nor a list of texts")
        marked = sorted({_marked(text, names) for text in texts}, key=len, reverse=True)
        found = regex.compile("|".join(map(regex.escape, marked)), regex.DOTALL)
        return Anchor(found, tuple(marked), any(_has_mark(text) for text in marked))
    if pattern not in spec:
        return None
    compiled = _compiled(scope, spec[pattern], names)
    return Anchor(compiled, (), _has_mark(compiled.pattern))


def _compiled(scope: str, pattern: Any, names: Mapping[str, str]) -> regex.Pattern[str]:
    import regex

    if not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN or _HUGE_REPEAT.search(pattern):
        _refuse(f"{scope} has a regular expression that is not text, or too long")
    # A name may be written with escapes: <\|turn\>, <[|]turn>.
    for name, mark in names.items():
        spelled = "".join(
            re.escape(one) if one.isalnum() else rf"(?:\\{re.escape(one)}|\[{re.escape(one)}\]|{re.escape(one)})"
            for one in name
        )
        pattern = re.sub(spelled, mark, pattern)
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        _refuse(f"{scope} has an invalid regular expression: {error}")


def _has_mark(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _marked(text: str, names: Mapping[str, str]) -> str:
    for name, mark in names.items():
        text = text.replace(name, mark)
    return text


def _texts(value: Any, depth: int = 0) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        if depth > 20:
            _refuse("it is nested too deeply")
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner, depth + 1)


def _marks(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, str]:
    """Name of each token that the template names -> its mark; longest first, as one name may contain another."""
    plain = [*texts, *(_ESCAPED.sub(lambda found: found[1] or found[2], text) for text in texts)]
    names = {name for text in plain for name in _TOKEN_NAME.findall(text) if _is_added(tokenizer, name)}
    every = "\n".join(plain)
    for token_id in tokenizer.special_token_ids:
        name = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        if name and name in every:
            names.add(name)
    if len(names) > _MOST_MARKS:
        _refuse("it names too many tokens")
    return {name: chr(_FIRST_MARK + at) for at, name in enumerate(sorted(names, key=lambda name: (-len(name), name)))}


def _is_added(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the name is one token in every text, as special and other added tokens are."""
    found = tokenizer.token_id(name)
    return found is not None and all(
        found in tokenizer.encode(text) for text in (name, f"a{name}b", f"{name}\n", f"<{name}>")
    )


# Parsers of content -------------------------------------------------------------------------------------------------


def _quotes(scope: str, pairs: Any, names: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    if not isinstance(pairs, list):
        _refuse(f"{scope} has string_delims that are no list")
    found = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) and one for one in pair):
            _refuse(f"{scope} has string_delims that are not pairs of texts")
        found.append((_marked(pair[0], names), _marked(pair[1], names)))
    return tuple(found)


def _json(scope: str, arguments: _Arguments, quotes: Sequence[tuple[str, str]], names: object) -> Callable[[str], Any]:
    lax, text_too = bool(quotes or arguments.get("unquoted_keys")), bool(arguments.get("allow_non_json"))

    def parse(text: str) -> Any:
        try:
            return lax_json(text, quotes) if lax else strict_json(text)
        except (ValueError, IndexError, RecursionError):
            if text_too:
                return text.strip()
            raise ValueError(text) from None

    return parse


def _xml(scope: str, arguments: _Arguments, quotes: object, names: Mapping[str, str]) -> Callable[[str], Any]:
    pattern = _compiled(scope, arguments.get("tag_pattern"), names)
    inner = _inner(scope, arguments)
    if "key" not in pattern.groupindex:
        _refuse(f"{scope} has a tag_pattern without a group named key")

    def parse(text: str) -> Any:
        found: dict[str, Any] = {}
        try:
            for match in pattern.finditer(text, timeout=SECONDS):
                groups = match.groupdict()
                key, value = groups["key"], inner(groups.get("value") or "")
                if key in found and arguments.get("merge_duplicates"):
                    earlier = found[key] if isinstance(found[key], list) else [found[key]]
                    found[key] = [*earlier, value]
                else:
                    found[key] = value
        except TimeoutError:
            raise slow_pattern() from None
        return found

    return parse


def _lines(scope: str, arguments: _Arguments, quotes: object, names: object) -> Callable[[str], Any]:
    line_end, between = arguments.get("line_sep", "\n"), arguments.get("kv_sep", ":")
    if not all(isinstance(one, str) and one for one in (line_end, between)):
        _refuse(f"{scope} has a line_sep or kv_sep that is not text")
    inner = _inner(scope, arguments)

    def parse(text: str) -> Any:
        parts = [line.partition(between) for line in text.split(line_end)]
        return {key.strip(): inner(value.strip()) for key, colon, value in parts if colon}

    return parse


def _inner(scope: str, arguments: _Arguments) -> Callable[[str], Any]:
    spec = arguments.get("value_parser")
    if spec is None:
        return str
    if not isinstance(spec, dict) or spec.get("name", "text") not in _PARSERS:
        _refuse(f"{scope} has an unknown value_parser")
    return _PARSERS[spec.get("name", "text")](scope, spec.get("args", {}), (), {})


def _scalar(convert: Callable[[str], Any]) -> Callable[..., Callable[[str], Any]]:
    return lambda scope, arguments, *_: lambda text: convert(text.strip() if arguments.get("strip", True) else text)


_PARSERS: dict[str, Callable[..., Callable[[str], Any]]] = {
    "text": _scalar(str),
    "int": _scalar(int),
    "float": _scalar(float),
    "bool": _scalar(lambda text: text.lower() in ("true", "1")),
    "json": _json,
    "xml-inline": _xml,
    "kv-lines": _lines,
}


def _rearranged(transform: Any, scope: Mapping[str, Any]) -> Any:
    """``transform`` with each "{name}" or "{name.key}" replaced by the value of that name."""
    if isinstance(transform, dict):
        return {key: _rearranged(value, scope) for key, value in transform.items()}
    if isinstance(transform, list):
        return [_rearranged(value, scope) for value in transform]
    whole = _PLACEHOLDER.fullmatch(transform) if isinstance(transform, str) else None
    if whole is None:
        return transform
    value: Any = scope
    for key in whole[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(transform)
        value = value[key]
    return value
