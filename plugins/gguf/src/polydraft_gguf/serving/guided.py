"""What an output must match, as llama.cpp's server takes it: a JSON schema, or a grammar in GBNF.

The server turns a schema into a grammar, and leaves out keywords that it does not know. These are refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polydraft.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract import Guided

__all__ = ["check_guided", "guided_values"]

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"),
    *("$id", "$defs", "definitions", "x-guidance"),
}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    # Bounds of numbers are left out in silence; a ``pattern`` may let quotation marks into a string as they are.
    "integer": _BOUNDS,
    "number": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}
"""Type -> keywords that ``json-schema-to-grammar.cpp`` heeds for it."""
_FORMATS = {"date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"}
_DEEPEST = 100


def guided_values(guided: Guided) -> dict[str, Any]:
    """The fields of a request to the server."""
    if guided.kind == "json":
        return {"json_schema": guided.data}
    if guided.kind == "choice":
        # Strings of GBNF have JSON's escapes.
        return {"grammar": f"root ::= {' | '.join(json.dumps(one, ensure_ascii=False) for one in guided.data)}"}
    return {"grammar": guided.text}


def check_guided(guided: Guided) -> None:
    """Refuse what the server cannot do, or would not do.

    Raises:
        UnsupportedError: A regular expression, a grammar of another dialect, a thought before the answer, or a keyword
            that llama.cpp leaves out.
        InvalidRequestError: The schema is malformed.
    """
    if guided.thought is not None:
        raise UnsupportedError(
            "llama.cpp's server has no thoughts before an answer that must match.",
            "Turn thinking off in `chat_template_kwargs`, or use the backend llama_cpp.",
        )
    if guided.kind == "regex" or (guided.kind == "grammar" and "::=" not in guided.text):
        what = "regular expressions" if guided.kind == "regex" else "grammars other than GBNF, or tool calls"
        raise UnsupportedError(
            f"llama.cpp's server does not force {what}.", "Give a JSON schema, or use the backend llama_cpp."
        )
    if guided.kind == "json":
        _check(guided.data, 0)


def _check(schema: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise InvalidRequestError("The JSON schema in `guided` is nested too deeply.", "Give a simpler one.")
    if schema is True:
        return
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"The JSON schema in `guided` holds {schema!r}, which is no schema.", "Correct it.")
    keywords = schema.keys() - _ANNOTATIONS
    for part in (*_inner(schema, "$defs", "definitions"), *_inner(schema, "properties")):
        _check(part, depth + 1)
    if "$ref" in keywords:
        _only(keywords, {"$ref"})
        if not str(schema["$ref"]).startswith("#"):
            raise _not_heeded("references to other documents")
    elif "anyOf" in keywords:
        _only(keywords, {"anyOf"})
        for part in schema["anyOf"]:
            _check(part, depth + 1)
    elif "const" in keywords or "enum" in keywords:
        _only(keywords, {"const", "enum", "type"})
    else:
        kinds = schema.get("type", "object" if "properties" in keywords else None)
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind is None:
                _only(keywords, set())
            elif kind not in _OF_TYPE:
                raise InvalidRequestError(f"The JSON schema in `guided` has the type {kind!r}.", "Correct it.")
        known = [_OF_TYPE[kind] for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind is not None]
        _only(keywords, set().union({"type"}, *known))
        _check_values(schema, depth)


def _check_values(schema: Mapping[str, Any], depth: int) -> None:
    if not set(schema.get("required", ())) <= set(schema.get("properties", ())):
        raise _not_heeded("required properties that are not listed")
    if "format" in schema and schema["format"] not in _FORMATS:
        raise _not_heeded(f"the format {schema['format']}")
    if "format" in schema and {"minLength", "maxLength"} & schema.keys():
        raise _not_heeded("a length next to a format")
    if {"minItems", "maxItems"} & schema.keys() and "items" not in schema:
        raise _not_heeded("a number of items without `items`")
    for key in ("items", "additionalProperties"):
        inner = schema.get(key)
        if inner is not None and not isinstance(inner, bool):
            for part in inner if isinstance(inner, list) else [inner]:
                _check(part, depth + 1)
    for part in schema.get("prefixItems", ()):
        _check(part, depth + 1)


def _inner(schema: Mapping[str, Any], *keys: str) -> list[Any]:
    return [part for key in keys for part in dict(schema.get(key) or {}).values()]


def _only(keywords: set[str], known: set[str]) -> None:
    unknown = sorted(str(key) for key in keywords - known)
    if unknown:
        raise _not_heeded(f"the keyword {unknown[0]}")


def _not_heeded(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"The JSON schema in `guided` has {what}, which llama.cpp's server does not heed there.",
        "Leave it out and check it in the answer, or use the backend llama_cpp.",
    )
