"""What an output must match, as llama.cpp's server takes it: a grammar in GBNF.

The server makes a grammar of a JSON schema itself, but leaves out keywords in silence, and lets white space go on to no
end. So it is made here: JSON on one line, as in the core's other engines, and what cannot be said is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.sampling.structured import depth_of, misused_keyword

from polydraft_gguf.serving.patterns import FORMATS, MOST_OPTIONAL, MOST_REPEATED, pattern_of

if TYPE_CHECKING:
    from polydraft.contract import Guided

__all__ = ["check_guided", "gbnf_of"]

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
    *("$id", "$defs", "definitions", "x-guidance"),
}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_DIGITS = 16
"""Of whole numbers: more are not exact in every reader of JSON."""
_MOST_PROPERTIES = 300
"""Of an object: llama.cpp needs a second to read the rules of as many, and minutes for 3,000."""
_LONGEST_CHAIN = 500
"""Rules and brackets inside one another: llama.cpp needs minutes for 3,000, if they may be empty."""
_NO_NAMES = re.compile(r'\#[^\n]*|"(?:\\.|[^"\\\n])*"?|\[(?:\\.|[^\]\\])*\]?')
"""Comments, texts and classes of characters, where a grammar has no names of rules."""
_OPTIONAL = re.compile(r"[*?]|\{0*,|\{0+\}")
_NUL = re.compile(r"\x00|\\(?:x00|u0000|U00000000)")
_COMMON = {
    "char": r"""[^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" hex)""",
    # Halves of surrogate pairs are no characters.
    "hex": "[0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}",
    "string": r'"\"" char* "\""',
    "whole": f'"-"? ("0" | [1-9] [0-9]{{0,{_DIGITS - 1}}})',
    "number": 'whole ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "array": '"[" (value (", " value)*)? "]"',
    "object": '"{" (string ": " value (", " string ": " value)*)? "}"',
    "value": 'string | number | array | object | "true" | "false" | "null"',
}
"""Rules that others use, by name."""


def check_guided(guided: Guided) -> None:
    """Refuse what the server cannot do.

    Raises:
        UnsupportedError: A grammar of another dialect, a thought before the answer, or an expression or a schema with
            what cannot be written here.
        InvalidRequestError: The schema or the expression is malformed, or nothing can match it.
    """
    if guided.thought is not None:
        raise UnsupportedError(
            "llama.cpp's server has no thoughts before an answer that must match.",
            "Turn thinking off in `chat_template_kwargs`, or use the backend llama_cpp.",
        )
    if guided.kind == "grammar" and "::=" not in guided.text:
        raise UnsupportedError(
            "llama.cpp's server does not force grammars other than GBNF, or tool calls.",
            "Give a JSON schema, or use the backend llama_cpp.",
        )
    gbnf_of(guided)
    if guided.kind == "grammar":
        _check_grammar(guided.text)


def _check_grammar(text: str) -> None:
    """Refuse what llama.cpp would need minutes for, or read otherwise."""
    bare = _NO_NAMES.sub("", text)
    depth, optional = depth_of(bare), len(_OPTIONAL.findall(bare))
    wrong = None
    if depth > _LONGEST_CHAIN:
        wrong = f"rules that lie {depth} deep inside one another, and {_LONGEST_CHAIN} are the most"
    elif optional > MOST_OPTIONAL:
        wrong = f"{optional} parts that may be empty, and {MOST_OPTIONAL} are the most"
    elif _NUL.search(text):
        wrong = "the character U+0000, which llama.cpp's grammars cannot have"
    if wrong is not None:
        raise InvalidRequestError(f"The grammar in `guided` has {wrong}.", "Change it.", argument="guided")


def gbnf_of(guided: Guided) -> str:
    """The grammar. Errors are those of ``check_guided``."""
    if guided.kind == "grammar":
        return guided.text
    if guided.kind == "regex":
        return f"root ::= {pattern_of(guided.text, quoted=False).text}\n"
    if guided.kind == "choice":
        if any("\x00" in one for one in guided.data):
            raise UnsupportedError(
                "A choice in `guided` has the character U+0000, which llama.cpp's grammars cannot have.",
                "Leave it out.",
            )
        return f"root ::= {' | '.join(map(_literal, guided.data))}\n"
    return _SchemaRules(guided.data).text()


class _SchemaRules:
    """The rules of one JSON schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._rules: dict[str, str] = dict(_COMMON)
        self._references: dict[str, str] = {}

    def text(self) -> str:
        """The grammar."""
        try:
            self._rules["root"] = self._value(self._root)
        except RecursionError:
            raise InvalidRequestError(
                "The JSON schema in `guided` is nested too deeply.", "Give a simpler one."
            ) from None
        return "".join(f"{name} ::= {body}\n" for name, body in self._rules.items())

    def _rule(self, body: str) -> str:
        name = f"v{len(self._rules)}"
        self._rules[name] = body
        return name

    def _value(self, schema: Any) -> str:
        """A value that a schema allows, as the name of a rule or a literal."""
        if schema is True:
            return "value"
        if not isinstance(schema, Mapping):
            raise _malformed(f"{schema!r}, which is no schema that a value can match")
        if (misused := misused_keyword(schema)) is not None:
            raise _malformed(f"the keyword {misused} with a value that no schema has")
        keywords = schema.keys() - _ANNOTATIONS
        if "$ref" in keywords:
            _only(keywords, {"$ref"})
            return self._referenced(schema["$ref"])
        if "const" in keywords or "enum" in keywords:
            _only(keywords, {"const", "type"} if "const" in keywords else {"enum", "type"})
            values = [schema["const"]] if "const" in keywords else schema["enum"]
            return self._rule(" | ".join(_literal(json.dumps(one, ensure_ascii=False)) for one in values))
        if "anyOf" in keywords:
            _only(keywords, {"anyOf"})
            return self._rule(" | ".join(self._value(one) for one in schema["anyOf"]))
        kinds = schema.get("type", "object" if "properties" in keywords else None)
        if isinstance(kinds, list):
            known = {name for kind in kinds for name in _OF_TYPE.get(kind, ())}
            _only(keywords, {"type"} | known)
            return self._rule(" | ".join(self._typed(kind, schema) for kind in kinds))
        _only(keywords, {"type", *_OF_TYPE.get(kinds, ())})
        return self._typed(kinds, schema)

    def _typed(self, kind: Any, schema: Mapping[str, Any]) -> str:
        if kind is None:
            return "value"
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            return self._array(schema)
        if kind == "string":
            return self._string(schema)
        if kind == "integer":
            return self._whole(schema) if any(name in schema for name in _BOUNDS) else "whole"
        found = {"number": "number", "boolean": '("true" | "false")', "null": '"null"'}.get(kind)
        if found is None:
            raise _malformed(f"the type {kind!r}")
        return found

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        times = _times(least, most)
        if not {"pattern", "format"} & schema.keys():
            return self._rule(rf'"\"" char{times} "\""') if least or most is not None else "string"
        if {"pattern", "format"} <= schema.keys():
            raise _unwritable("both `pattern` and `format` for one string")
        if not isinstance(schema.get("pattern", schema.get("format")), str):
            raise _malformed("a `pattern` or `format` that is no text")
        if "format" in schema and schema["format"] not in FORMATS:
            raise _unwritable(f"the format {schema['format']!r}")
        found = pattern_of(schema["pattern"] if "pattern" in schema else FORMATS[schema["format"]], quoted=True)
        if found.least < least or (most is not None and (found.most is None or found.most > most)):
            raise _unwritable("`minLength` or `maxLength` that a `pattern` or `format` does not keep by itself")
        return self._rule(found.text)

    def _referenced(self, reference: str) -> str:
        known = self._references.get(reference)
        if known is None:
            found = self._root
            for part in reference.removeprefix("#").split("/")[1:]:
                found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
            if not reference.startswith("#") or found is None:
                raise _malformed(f"the reference {reference}, which leads nowhere in it")
            # Before its value: it may refer to itself.
            known = self._references[reference] = f"r{len(self._references)}"
            self._rules[known] = self._value(found)
        return known

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        item = self._value(schema.get("items", True))
        if most == 0:
            return '"[]"'
        more = f'{item} (", " {item}){_times(max(least - 1, 0), None if most is None else most - 1)}'
        return self._rule(f'"[" {more} "]"' if least else f'"[" ({more})? "]"')

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
        if len(properties) > _MOST_PROPERTIES:
            raise _unwritable(f"an object with more than {_MOST_PROPERTIES} properties")
        more = schema.get("additionalProperties", True)
        if not required <= properties.keys():
            raise _unwritable(f"the property {min(required - properties.keys())}, which is required and not listed")
        if not properties:
            pair = f'string ": " {self._value(more)}' if more is not False else ""
            return self._rule(f'"{{" ({pair} (", " {pair})*)? "}}"') if pair else '"{}"'
        # By which property comes first: only the others have a comma before them.
        begins: list[str] = []
        rest = '""'  # the rule of all later ones
        for key, value in reversed(properties.items()):
            pair = f"{_literal(json.dumps(key, ensure_ascii=False) + ': ')} {self._value(value)}"
            must = key in required
            begins = [f"{pair} {rest}", *([] if must else begins)]
            rest = self._rule(f'", " {pair} {rest}' if must else f'", " {pair} {rest} | {rest}')
        return self._rule(f'"{{" ({" | ".join(begins)}){"" if required else "?"} "}}"')

    def _whole(self, schema: Mapping[str, Any]) -> str:
        largest = 10**_DIGITS - 1
        try:
            least = max(
                math.ceil(schema.get("minimum", -largest)), math.floor(schema.get("exclusiveMinimum", -largest - 1)) + 1
            )
            most = min(
                math.floor(schema.get("maximum", largest)), math.ceil(schema.get("exclusiveMaximum", largest + 1)) - 1
            )
        except (TypeError, ValueError, OverflowError):
            raise _malformed("a bound that is no number") from None
        least, most = max(least, -largest), min(most, largest)
        if least > most:
            raise _malformed("an integer that no number matches")
        parts = [f'"-" ({one})' for one in _between(max(-most, 1), -least)] if least < 0 else []
        parts += ['"0"'] if least <= 0 <= most else []
        parts += _between(max(least, 1), most) if most > 0 else []
        return self._rule(" | ".join(parts))


_OF_TYPE: dict[Any, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _BOUNDS,
}
"""Type -> keywords that are heeded for it."""


def _between(least: int, most: int) -> list[str]:
    """The whole numbers of at least 1 between two bounds, both included."""
    found = []
    while least <= most:
        end = min(10 ** len(str(least)) - 1, most)  # numbers with as many digits
        found.append(_digits(str(least), str(end)))
        least = end + 1
    return found


def _digits(least: str, most: str) -> str:
    """The texts of digits between two of the same length."""
    first, last, left = least[0], most[0], len(least) - 1
    free = f" [0-9]{{{left}}}" if left else ""
    if least[1:] == "0" * left and most[1:] == "9" * left:
        return f"[{first}-{last}]{free}"
    if first == last:
        return f'"{first}" {_digits(least[1:], most[1:])}'
    parts = [f'"{first}" {_digits(least[1:], "9" * left)}']
    if int(first) + 1 < int(last):
        parts.append(f"[{int(first) + 1}-{int(last) - 1}]{free}")
    parts.append(f'"{last}" {_digits("0" * left, most[1:])}')
    return f"({' | '.join(parts)})"


def _times(least: Any, most: Any) -> str:
    if (
        not isinstance(least, int)
        or not isinstance(most, int | None)
        or least < 0
        or (most is not None and most < least)
    ):
        raise _malformed(f"the lengths {least!r} to {most!r}")
    if max(least, most or 0) > MOST_REPEATED:
        raise _unwritable(f"a length above {MOST_REPEATED}")
    return f"{{{least},{'' if most is None else most}}}"


def _literal(text: str) -> str:
    # GBNF has JSON's escapes, but for those of two control characters.
    told = {"\b": r"\x08", "\f": r"\x0c"}
    inner = (told.get(part) or json.dumps(part, ensure_ascii=False)[1:-1] for part in re.split("([\b\f])", text))
    return f'"{"".join(inner)}"'


def _only(keywords: set[str], known: set[str]) -> None:
    unknown = sorted(str(key) for key in keywords - known)
    if unknown:
        raise _unwritable(f"the keyword {unknown[0]}")


def _malformed(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"The JSON schema in `guided` has {what}.", "Correct it.", argument="guided")


def _unwritable(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"The JSON schema in `guided` has {what}, which llama.cpp's server is not made to heed there.",
        "Leave it out and check it in the answer, or use the backend llama_cpp.",
    )
