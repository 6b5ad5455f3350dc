"""Reading the registry's TOML files: tables into records, and errors that name file, line and field."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from packaging.version import Version
from pydantic import ValidationError

from polydraft.contract.packings import PackingRecord
from polydraft.contract.records import PairRecord, Record
from polydraft.errors import InvalidRequestError
from polydraft.files import LONG_NUMBER, read_bytes, system_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["check_packing_record", "check_pair_record", "core_table", "expand", "read_packings", "read_pairs"]

_GROUP = re.compile(r"\{([^{}]*)\}")
_TABLES = ("pair", "packing")
"""The tables that a user's file may hold."""
_ONLY = "It may hold tables [[pair]] and [[packing]] only."
R = TypeVar("R", bound=Record)


def core_table(name: str, *, file: str = "") -> list[dict[str, Any]]:
    """The tables ``[[name]]`` of the core's own file ``data/<file>.toml``; by default ``data/<name>s.toml``."""
    text = files("polydraft._registry").joinpath("data", f"{file or f'{name}s'}.toml").read_text(encoding="utf-8")
    tables: list[dict[str, Any]] = tomllib.loads(text)[name]
    return tables


def read_pairs(path: Path) -> list[PairRecord]:
    """The tables ``[[pair]]`` of a user's file.

    Raises:
        InvalidRequestError: The file cannot be read, is not TOML, or holds something else; or a field is missing,
            unknown or wrong: the sentence names file, line and field.
    """
    return _read(path, "pair", PairRecord, check_pair_record)


def read_packings(path: Path) -> list[PackingRecord]:
    """The tables ``[[packing]]`` of a user's file; errors are those of ``read_pairs``."""
    return _read(path, "packing", PackingRecord, check_packing_record)


def _read(path: Path, kind: str, record: type[R], check: Callable[[R], None]) -> list[R]:
    try:
        with system_errors(f"{path} cannot be read"):
            # Some editors of Windows start a file with a byte order mark.
            text = read_bytes(path).decode("utf-8-sig")
            data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequestError(f"{path} is not valid TOML: {error}.", "Fix the syntax there.") from error
    except RecursionError as error:
        raise InvalidRequestError(f"{path} is nested too deeply.", _ONLY) from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} cannot be read: it is not UTF-8 text.", "Save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        why = (error.strerror or error) if isinstance(error, OSError) else LONG_NUMBER
        raise InvalidRequestError(f"{path} cannot be read: {why}.", "Check the file.") from error
    if unknown := sorted(set(data) - set(_TABLES)):
        raise InvalidRequestError(f"{path} holds {unknown[0]!r}.", _ONLY)
    for name, tables in data.items():
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise InvalidRequestError(f"{path} has a {name!r} that is not a list of tables.", _ONLY)
    found: list[R] = []
    for number, table in enumerate(data.get(kind, []), 1):
        try:
            found.append(record.model_validate({"drafter": None, **table} if kind == "pair" else table))
            check(found[-1])
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or kind
            raise InvalidRequestError(
                f"{path}, line {_line(text, kind, number)}: [[{kind}]] number {number} is wrong: {field}: "
                f"{first['msg']}.",
                f"Known fields: {', '.join(record.model_fields)}.",
            ) from error
        except ValueError as error:
            raise InvalidRequestError(
                f"{path}: [[{kind}]] number {number} is wrong: {error}.", f"Write one entry for each {kind}."
            ) from error
    return found


def _line(text: str, kind: str, number: int) -> int:
    """Line of the n-th ``[[kind]]``, from 1; 1 if it is written in another way."""
    pattern = re.compile(rf"\s*\[\[\s*{kind}\s*\]\]")
    lines = [i for i, line in enumerate(text.splitlines(), 1) if pattern.match(line)]
    return lines[number - 1] if number <= len(lines) else 1


def check_pair_record(pair: PairRecord) -> None:
    """Check what the record's types do not express.

    Raises:
        ValueError: A k is not positive, a version is not of PEP 440, or the groups of the ids differ in size.
    """
    for k in pair.num_speculative_tokens.values():
        if k < 1:
            raise ValueError(f"it recommends {k} tokens, but k is at least 1")
    for version in pair.min_versions.values():
        Version(version)
    list(expand(pair.target, pair.drafter, pair.drafter_file))


def check_packing_record(packing: PackingRecord) -> None:
    """Check what the record's types do not express.

    Raises:
        ValueError: The groups of its fields differ in size, or a size stands for several packings.
    """
    count = len(list(expand(packing.target, packing.repo, packing.quantization, packing.file)))
    if packing.bytes is not None and count > 1:
        raise ValueError("an entry with a size must be of one packing")


def expand(*texts: str | None) -> Iterator[tuple[str | None, ...]]:
    """Expand the ``{A,B}`` group that each text may hold; groups of several texts are expanded in step.

    >>> list(expand("t-{a,b}", "d-{a,b}", None))
    [('t-a', 'd-a', None), ('t-b', 'd-b', None)]
    >>> list(expand("t-{a,b}", "d"))
    [('t-a', 'd'), ('t-b', 'd')]

    Raises:
        ValueError: A text holds two groups, or groups are not of one size.
    """
    groups = [_GROUP.findall(text) if text else [] for text in texts]
    if any(len(group) > 1 for group in groups):
        raise ValueError("an id may hold one {A,B} group only")
    members = [[part.strip() for part in group[0].split(",")] if group else [] for group in groups]
    sizes = {len(parts) for parts in members if parts}
    if len(sizes) > 1:
        raise ValueError("the {A,B} groups of one entry must have equally many members")
    for i in range(sizes.pop() if sizes else 1):
        yield tuple(
            _with_member(text, parts[i]) if text and parts else text for text, parts in zip(texts, members, strict=True)
        )


def _with_member(text: str, member: str) -> str:
    """A text with one member in place of its ``{A,B}`` group."""
    return _GROUP.sub(lambda _: member, text)
