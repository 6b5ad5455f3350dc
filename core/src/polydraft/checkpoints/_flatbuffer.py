"""Read tables of a FlatBuffer by the numbers of their fields, with every offset checked against the buffer.

The layout is that of https://flatbuffers.dev/internals. The ``flatbuffers`` package reads the same with generated
classes, and believes the offsets that it finds: a damaged file gives it wrong values, or loops of billions of items.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

__all__ = ["DamagedError", "Table", "root"]

_MOST_ITEMS = 1 << 18
"""Items of a list: more than any model has, and few enough to be looked at in seconds."""


class DamagedError(ValueError):
    """An offset or a length that leads out of the buffer."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: where its fields are, says its vtable."""

    buffer: memoryview
    place: int

    def number(self, field: int, code: str, default: int = 0) -> int:
        """A scalar by its ``struct`` code; ``default`` where the file leaves it out."""
        place = self._field(field)
        return default if place is None else int(_unpack(code, self.buffer, place))

    def table(self, field: int) -> Table | None:
        """A table inside this one."""
        place = self._field(field)
        return None if place is None else Table(self.buffer, _follow(self.buffer, place))

    def text(self, field: int) -> str:
        """A string; empty where the file leaves it out."""
        start, count = self._vector(field, 1)
        return bytes(self.buffer[start : start + count]).decode("utf-8", "replace")

    def tables(self, field: int) -> list[Table]:
        """A vector of tables."""
        start, count = self._vector(field, 4)
        return [Table(self.buffer, _follow(self.buffer, start + 4 * index)) for index in range(count)]

    def numbers(self, field: int, code: str) -> list[int]:
        """A vector of scalars by their ``struct`` code."""
        size = struct.calcsize(f"<{code}")
        start, count = self._vector(field, size)
        return list(struct.unpack_from(f"<{count}{code}", self.buffer, start))

    def _field(self, field: int) -> int | None:
        vtable = self.place - _unpack("i", self.buffer, self.place)
        entry = 4 + 2 * field
        if entry >= _unpack("H", self.buffer, vtable):
            return None
        offset = _unpack("H", self.buffer, vtable + entry)
        return self.place + offset if offset else None

    def _vector(self, field: int, item_bytes: int) -> tuple[int, int]:
        """Where the items of a vector start, and how many there are."""
        place = self._field(field)
        if place is None:
            return 0, 0
        start = _follow(self.buffer, place)
        count = _unpack("I", self.buffer, start)
        if count > _MOST_ITEMS or start + 4 + count * item_bytes > len(self.buffer):
            raise DamagedError(f"a list has {count} items")
        return start + 4, count


def root(buffer: memoryview) -> Table:
    """The root table of a FlatBuffer.

    Raises:
        DamagedError: Here and in all methods: an offset leads out of the buffer.
    """
    return Table(buffer, _follow(buffer, 0))


def _follow(buffer: memoryview, place: int) -> int:
    return place + int(_unpack("I", buffer, place))


def _unpack(code: str, buffer: memoryview, place: int) -> Any:
    if place < 0:  # which ``struct`` would count from the end
        raise DamagedError("an offset is negative")
    try:
        return struct.unpack_from(f"<{code}", buffer, place)[0]
    except struct.error:
        raise DamagedError(f"an offset leads to byte {place} of {len(buffer)}") from None
