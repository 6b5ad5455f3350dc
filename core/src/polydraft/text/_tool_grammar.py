"""The grammar of tool calls, in the format in which the model writes them, with the arguments that the tools take.

Lark as llguidance reads it. Tokens that delimit a call are named by their ids, ``<[7]>``: text that spells them is no
such token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polydraft._numbers import shown
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.sampling._schema_shape import misused_keyword
from polydraft.text._call_values import QUOTES

if TYPE_CHECKING:
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["tool_grammar"]

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
    *("$id", "$defs", "definitions", "nullable", "strict", "additionalProperties", "x-guidance"),
}
"""Keywords of a schema that allow and forbid nothing here: a call has no properties but those that are listed."""
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NOT_IN_KEYS = frozenset('{}[],:"\\ \t\n\r<>')
_ANY = {"type": ["string", "number", "boolean", "null"]}
"""In place of a value without a schema."""


def tool_grammar(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], name: str | None = None) -> str:
    """The grammar of calls.

    Args:
        tokenizer: Its tokens say which of the known formats the model has.
        tools: The normalised tools.
        name: The one that is called, once; None: any of them, at least once.

    Raises:
        InvalidRequestError: There is no such tool, or what a tool says of its arguments is no schema.
        UnsupportedError: The model's format is not known, or an argument's schema cannot be written in it.
    """
    try:
        return _grammar(tokenizer, [tool["function"] for tool in tools], name)
    except RecursionError:
        raise InvalidRequestError(
            "The schema of a tool's arguments is nested too deeply.", "Give a flatter one.", argument="tools"
        ) from None


def _grammar(tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], name: str | None) -> str:
    if name is not None:
        known = [function["name"] for function in functions]
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise InvalidRequestError(
                f"`tool_choice` names {name!r}, and there is no such tool.",
                f"The `tools` are: {', '.join(map(str, known))}.",
                argument="tool_choice",
            )
    first, last, quote = (tokenizer.token_id(one) for one in ("<|tool_call>", "<tool_call|>", QUOTES[0][0]))
    if first is not None and last is not None and quote is not None:
        rules = _GemmaRules(quote)
        calls = [f'"call:{_key(one["name"])}" {rules.arguments(one)}' for one in functions]
        lines = [f"call: <[{first}]> ({' | '.join(calls)}) <[{last}]>", *rules.lines]
        return "\n".join([f"start: {'call' if name else 'call+'}", *lines, ""])
    first, last = tokenizer.token_id("<tool_call>"), tokenizer.token_id("</tool_call>")
    if first is not None and last is not None and getattr(tokenizer, "response_template", None) is None:
        value = json.dumps(_json_calls(functions))
        # As Qwen's and Hermes's templates write them: each on lines of its own.
        more = "" if name else ' ("\\n" call)*'
        return f'start: call{more}\ncall: <[{first}]> "\\n" value "\\n" <[{last}]>\nvalue: %json {value}\n'
    raise UnsupportedError(
        "`tool_choice` asks for a call, and polydraft does not know how this model writes calls.",
        "Use `tool_choice='auto'`, or a JSON schema of the arguments in `guided`.",
    )


def _json_calls(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of ``{"name": ..., "arguments": {...}}``; each tool's own schema is one of its definitions."""
    calls, definitions = [], {}
    for index, function in enumerate(functions):
        place = f"tool{index}"
        definitions[place] = _moved(function.get("parameters") or {"type": "object"}, f"#/$defs/{place}")
        properties = {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}}
        required = ["name", "arguments"]
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    layout = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    return {"anyOf": calls, "$defs": definitions, "x-guidance": layout}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references lead into ``root``."""
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value[:1] == "#"
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(one, root) for one in schema] if isinstance(schema, list) else schema


class _GemmaRules:
    """Rules for values in Gemma 4's dialect: bare keys, and a token as quotation mark.

    Args:
        quote: That token.
    """

    def __init__(self, quote: int) -> None:
        self._quote = f"<[{quote}]>"
        self.lines: list[str] = []
        self._root: Mapping[str, Any] = {}
        self._rules: dict[tuple[int, str], str] = {}  # (tool, reference) -> rule
        self._tools = 0

    def arguments(self, function: Mapping[str, Any]) -> str:
        """The arguments of one tool, as an expression."""
        self._root = function.get("parameters") or {"type": "object"}
        self._tools += 1
        return self._value(self._root, str(function["name"]))

    def _rule(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name

    def _value(self, schema: Any, where: str) -> str:
        """A value that a schema allows, as the name of a rule."""
        if schema is True or schema == {}:
            schema = _ANY
        if not isinstance(schema, Mapping):
            raise _unwritable(where, f"the schema {schema!r}")
        if (misused := misused_keyword(schema)) is not None:
            raise InvalidRequestError(
                f"In `tools`, the argument {where} has `{misused}: {shown(schema[misused])}`, which no schema has.",
                "Correct the tool's `parameters`.",
                argument="tools",
            )
        if "$ref" in schema:
            return self._referenced(schema["$ref"], where)
        if "const" in schema:
            self._only(schema, {"const", "enum", "type"}, where)
            return self._rule(self._literal(schema["const"], where))
        if "enum" in schema:
            self._only(schema, {"enum", "type"}, where)
            return self._rule(" | ".join(self._literal(one, where) for one in schema["enum"]))
        for union in ("anyOf", "oneOf"):
            if union in schema:
                self._only(schema, {union, "type"}, where)
                return self._rule(" | ".join(self._value(one, where) for one in schema[union]))
        if len(schema.get("allOf", ())) == 1:
            self._only(schema, {"allOf", "type"}, where)
            return self._value(schema["allOf"][0], where)
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kinds, list):
            return self._rule(" | ".join(self._value({**schema, "type": one}, where) for one in kinds))
        make: Callable[[Mapping[str, Any], str], str] | None = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._number,
            "number": self._number,
            "boolean": lambda *_: '"true" | "false"',
            "null": lambda *_: '"null"',
        }.get(str(kinds))
        if make is None:
            raise _unwritable(where, f"the type {kinds!r}")
        expression = make(schema, where)
        return self._rule(f'{expression} | "null"' if schema.get("nullable") is True else expression)

    def _referenced(self, reference: str, where: str) -> str:
        known = self._rules.get((self._tools, reference))
        if known is None:
            found: Any = self._root
            for part in reference.removeprefix("#").split("/")[1:]:
                found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
            if not reference.startswith("#") or found is None:
                raise _unwritable(where, f"the reference {reference}")
            # Before its value: it may refer to itself.
            known = self._rules[self._tools, reference] = f"r{len(self._rules)}"
            self.lines.append(f"{known}: {self._value(found, where)}")
        return known

    def _literal(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            text = f"{json.dumps(value, ensure_ascii=False)} " if value else ""
            return f"{self._quote} {text}{self._quote}"
        if isinstance(value, Mapping | list):
            raise _unwritable(where, "a constant that is an object or an array")
        return json.dumps(json.dumps(value))

    def _string(self, schema: Mapping[str, Any], where: str) -> str:
        self._only(schema, {"type", "minLength", "maxLength"}, where)
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        return f"{self._quote} /(?s:.{{{least},{most}}})/ {self._quote}"

    def _number(self, schema: Mapping[str, Any], where: str) -> str:
        self._only(schema, {"type", *_NUMBERS}, where)
        return f"%json {json.dumps({key: value for key, value in schema.items() if key in {'type', *_NUMBERS}})}"

    def _array(self, schema: Mapping[str, Any], where: str) -> str:
        self._only(schema, {"type", "items", "minItems", "maxItems"}, where)
        item = self._value(schema.get("items", True), where)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most is not None and least > most:
            raise _unwritable(where, "more minItems than maxItems")
        if most == 0:
            return '"[" "]"'
        more = f'{item} ("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return f'"[" {more} "]"' if least else f'"[" ({more})? "]"'

    def _object(self, schema: Mapping[str, Any], where: str) -> str:
        self._only(schema, {"type", "properties", "required"}, where)
        properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
        if not required <= properties.keys():
            raise _unwritable(where, f"a property that is required and not listed: {min(required - properties.keys())}")
        # By which property comes first: only the others have a comma before them.
        begins: list[str] = []
        rest = '""'  # the rule of all later ones
        for key, value in reversed(properties.items()):
            pair = f'"{_key(key)}:" {self._value(value, f"{where}.{key}")}'
            must = key in required
            begins = [f"{pair} {rest}", *([] if must else begins)]
            rest = self._rule(f'"," {pair} {rest}' if must else f'"," {pair} {rest} | {rest}')
        if not begins:
            return '"{" "}"'
        inner = f"({' | '.join(begins)})"
        return f'"{{" {inner} "}}"' if required else f'"{{" {inner}? "}}"'

    def _only(self, schema: Mapping[str, Any], known: set[str], where: str) -> None:
        unknown = sorted(str(key) for key in schema if key not in known and key not in _ANNOTATIONS)
        if unknown:
            raise _unwritable(where, f"the keyword {unknown[0]}")


def _key(name: str) -> str:
    if not name or not _NOT_IN_KEYS.isdisjoint(name):
        raise _unwritable(name, "a name with such characters")
    return name


def _unwritable(where: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"In `tools`, the argument {where} has {what}, which polydraft cannot force in this model's format of calls.",
        "Leave it out of the tool's schema, or use `tool_choice='auto'`.",
    )
