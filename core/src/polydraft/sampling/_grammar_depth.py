"""How deep the rules of a grammar lie inside one another: llguidance reads them by recursion, which ends a process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from typing import Any
from urllib.parse import unquote

__all__ = ["depth_of"]

_TOKENS = re.compile(
    r"""
    (?P<skipped> "(?:\\.|[^"\\\n])*"? | (?://|\#)[^\n]* | /(?:\\.|[^/\\])+/? )
    | (?P<schema> %json \s* (?=[\[{]) )
    | ^[ \t]* [?!]? (?P<rule> [\w-]+ ) [ \t]* (?: \[[^\]\n]*\] [ \t]* | ::\w+ [ \t]* )? :
    | (?P<name> [\w-]+ )
    | (?P<opening> [(\[{] )
    | (?P<closing> [)\]}] )
    """,
    re.VERBOSE | re.MULTILINE,
)
"""Of Lark: texts, comments and regular expressions name no rules. Nothing is read twice, whatever a text holds."""
_MOST_REFERENCES = 1000

Parts = dict[str, tuple[int, set[str]]]
"""Rules, and the places of a schema that are referred to: how deep each is by itself, and to which it refers."""


def depth_of(lark: str) -> int:
    """An upper bound of the brackets, rules and references of a grammar that lie inside one another.

    Rules that refer to one another in a circle all count.

    Raises:
        ValueError: It holds a schema that is no JSON, or has too many references; in words for the caller.
    """
    parts = _parts_of(lark)
    # A text may name a rule that there is not: whoever compiles it says so.
    references = {name: found & parts.keys() for name, (_, found) in parts.items()}
    referrers: dict[str, set[str]] = {name: set() for name in parts}
    for name, found in references.items():
        for one in found:
            referrers[one].add(name)
    left, bound = set(parts), 0
    for graph in (references, referrers):
        depths: dict[str, int] = {}
        for name in _in_order({name: graph[name] & left for name in left}):
            depths[name] = parts[name][0] + max((depths.get(one, 0) for one in graph[name]), default=0)
        bound += max(depths.values(), default=0)
        left -= depths.keys()
    return bound + sum(parts[name][0] for name in left)


def _in_order(graph: dict[str, set[str]]) -> Iterator[str]:
    """Nodes after those that they lead to, except for those on circles and before them."""
    sorter = TopologicalSorter(graph)
    with suppress(CycleError):
        sorter.prepare()
    while ready := sorter.get_ready():
        yield from ready
        sorter.done(*ready)


def _parts_of(lark: str) -> Parts:
    parts: Parts = {}
    rule, at, depth, deepest = "", 0, 0, 0
    names: set[str] = set()

    def end() -> None:
        before = parts.get(rule, (0, set()))
        parts[rule] = max(before[0], 1 + deepest), before[1] | names

    while (found := _TOKENS.search(lark, at)) is not None:
        at = found.end()
        match found.lastgroup:
            case "rule":
                end()
                rule, depth, deepest, names = found["rule"], 0, 0, set()
            case "name":
                names.add(found["name"])
            case "schema":
                try:
                    schema, at = json.JSONDecoder().raw_decode(lark, at)
                except ValueError:
                    raise ValueError("what follows `%json` is no JSON") from None
                names.add(_add_schema(parts, schema, f"{found.start()}:"))
            case "opening":
                depth += 1
                deepest = max(deepest, depth)
            case "closing":
                depth -= 1
    end()
    return parts


def _add_schema(parts: Parts, schema: Any, prefix: str) -> str:
    """Add the places of a schema that are referred to; returns the name of the whole."""
    order: list[str] = []
    spans: dict[int, tuple[int, int, int]] = {}  # of an object or array: its first and last reference, and its depth
    ids = 0

    def walk(value: Any) -> int:
        nonlocal ids
        first = len(order)
        if isinstance(value, dict):
            ids += isinstance(value.get("$id"), str)
            if isinstance(value.get("$ref"), str):
                order.append(f"{prefix}{value['$ref']}")
        inner = value.values() if isinstance(value, dict) else value
        depth = 1 + max((walk(one) for one in inner if isinstance(one, dict | list)), default=0)
        spans[id(value)] = first, len(order), depth
        return depth

    deepest = walk(schema)
    every = set(order)
    if len(every) > _MOST_REFERENCES:
        raise ValueError(f"it has {len(every)} references, and {_MOST_REFERENCES} are the most")
    for name in every:
        place = _place(schema, name.removeprefix(prefix))
        if ids > isinstance(schema.get("$id"), str) or not isinstance(place, dict | list):
            parts[name] = 1 + deepest, every  # by an identifier: it may be any part
        else:
            first, last, depth = spans[id(place)]
            parts[name] = 1 + depth, set(order[first:last])
    parts[prefix] = deepest, every
    return prefix


def _place(schema: Any, reference: str) -> Any:
    """What a JSON pointer leads to; None: nothing."""
    found = schema
    for part in unquote(reference.partition("#")[2]).split("/")[1:]:
        if isinstance(found, dict):
            found = found.get(part.replace("~1", "/").replace("~0", "~"))
        elif isinstance(found, list) and re.fullmatch("[0-9]{1,7}", part):
            found = found[int(part)] if int(part) < len(found) else None
        else:
            return None
    return found
