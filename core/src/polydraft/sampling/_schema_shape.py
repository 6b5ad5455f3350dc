"""Keywords of a JSON schema whose values no schema has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["misused_keyword"]

_LISTS = ("enum", "anyOf", "oneOf", "allOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")


def misused_keyword(schema: Mapping[str, Any]) -> str | None:
    """The first keyword of a JSON schema that is malformed in itself, such as ``{"enum": 5}``; None: there is none.

    For those who write grammars: of the keywords that their values are made of, the others, and what lies inside, are
    not looked at.

    >>> misused_keyword({"type": "string", "minLength": "x"})
    'minLength'
    """
    kinds, required = schema.get("type", "any"), schema.get("required") or []
    right = {
        "type": isinstance(kinds, str) or (_texts(kinds) and kinds != []),
        **{key: isinstance(schema.get(key), list) and schema[key] != [] for key in _LISTS},
        **{key: type(schema.get(key)) is int and schema[key] >= 0 for key in _COUNTS},
        "properties": isinstance(schema.get("properties") or {}, Mapping),
        "required": _texts(required),
        "$ref": isinstance(schema.get("$ref"), str),
    }
    return next((key for key, fits in right.items() if key in schema and not fits), None)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
