"""The header of a GGUF file: its metadata and tensor names, without its weights.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. The
``gguf`` package reads the same, but makes several arrays for every string: 40 s for a vocabulary of 262,144 tokens.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polydraft.errors import ModelFormatError
from polydraft.files import open_regular, system_errors

__all__ = ["GgufHeader", "StringArray", "read_header"]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Numbers of GGUF's value types, and the ``struct`` codes of those with a fixed size.
_STRING, _ARRAY = 8, 9
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DEEPEST = 4
# Beyond any model's. A header with more is refused before memory is taken for it.
_MOST_TENSORS, _MOST_PAIRS, _MOST_ITEMS, _MOST_TEXT = 1 << 20, 1 << 16, 1 << 22, 1 << 26
_FEW = 1 << 12
"""Arrays of up to this many numbers (one per layer, or per dimension) are tuples."""
_MOST_DIMENSIONS = 8
_AGAIN = "Download it again."
_MOST_LAYERS = 10_000
# No count or size of a model needs more than 32 bits.
_MOST = 2**32 - 1
_NUMBERS = (
    *("block_count", "context_length", "embedding_length", "embedding_length_out", "vocab_size"),
    *("attention.key_length", "attention.key_length_swa", "attention.value_length", "attention.value_length_swa"),
    *("attention.sliding_window", "attention.shared_kv_layers", "rope.dimension_count", "rope.dimension_count_swa"),
    *("expert_count", "nextn_predict_layers"),
)
_PATTERN = "attention.sliding_window_pattern"
"""May be shorter than the number of layers: those that only draft are not always in it."""
_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "expert_used_count", _PATTERN)
"""One number for all layers, or one number (or bool) per layer."""


@dataclass(frozen=True, slots=True)
class StringArray:
    """An array of strings as the file stores it. Equal bytes are equal strings; ``strings`` decodes them."""

    raw: bytes
    count: int

    def __len__(self) -> int:
        return self.count

    def items(self) -> list[bytes]:
        """The strings as they are stored."""
        found, at, unpack = [], 0, struct.Struct("<Q").unpack_from
        for _ in range(self.count):
            end = at + 8 + unpack(self.raw, at)[0]
            found.append(self.raw[at + 8 : end])
            at = end
        return found

    def strings(self) -> list[str]:
        """The strings; bytes that are not UTF-8 become replacement characters."""
        return [item.decode("utf-8", "replace") for item in self.items()]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensors of one file."""

    metadata: Mapping[str, Any]
    """Key -> number, bool, string, tuple of these, ``array`` of many numbers, or ``StringArray``."""
    tensors: Mapping[str, tuple[int, ...]]
    """Name -> shape, the fastest dimension first, as GGUF has it."""
    types: Mapping[str, int]
    """Name -> number of the type (``ggml_type``)."""

    @property
    def architecture(self) -> str:
        """``general.architecture``: ``gemma4``, ``gemma4-assistant``, ``llama``; empty if the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """A value by its key without the architecture: ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_header(path: Path, name: str = "") -> GgufHeader:
    """Read a file's header, and check that the file reaches as far as its tensors.

    Args:
        path: The file; of a split model, its first part.
        name: The model's name, for the message; default: the path.

    Raises:
        ModelFormatError: It is not a GGUF file, of an unknown version, cut short, or has values that no model has.
    """
    name = name or str(path)
    try:
        with system_errors(f"{name} cannot be read"), open_regular(path) as file:
            magic = file.read(4)
            if magic != MAGIC:
                raise ModelFormatError(f"{name} is not a GGUF file: it starts with {magic!r}.", _AGAIN)
            # Mapped, not read: a header has megabytes, its file gigabytes.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Reader(data).header(name)
    except OSError as error:
        raise ModelFormatError(
            f"{name} cannot be read: {error.strerror or error}.", f"Check the file {path}."
        ) from error
    except _TooMuchError as error:
        raise ModelFormatError(
            f"{name} is damaged: its GGUF header holds {error}, more than any model's.", "Download or convert it again."
        ) from error
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ModelFormatError(
            f"{name} is cut short or damaged: its GGUF header cannot be read to its end.", _AGAIN
        ) from error
    _check_values(header, name)
    return header


class _TooMuchError(Exception):
    """The header says that it holds more than any model's; the text says what."""


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(MAGIC)

    def header(self, name: str) -> GgufHeader:
        version = self._number("I")
        if version not in _VERSIONS:
            raise ModelFormatError(
                f"{name} is a GGUF file of version {version} (or big endian); versions 2 and 3 can be read.",
                "Convert or download it again.",
            )
        # Magic, version (u32), number of tensors (u64), number of pairs (u64), then the pairs, then the tensors.
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        if tensor_count > _MOST_TENSORS or pair_count > _MOST_PAIRS:
            raise _TooMuchError(f"{tensor_count} tensors and {pair_count} pairs of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        tensors: dict[str, tuple[int, ...]] = {}
        types: dict[str, int] = {}
        end = 0
        for _ in range(tensor_count):
            # Name, number of dimensions (u32), dimensions (u64 each), type (u32), offset of the data (u64).
            tensor = self._string()
            dimensions = self._number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise IndexError
            tensors[tensor] = tuple(self._number("Q") for _ in range(dimensions))
            types[tensor] = self._number("I")
            # Start of the last tensor, in bytes after the header; sizes by type are not known here.
            end = max(end, self._number("Q"))
        if self._at + end > len(self._data):
            raise ModelFormatError(
                f"{name} is cut short: it has {len(self._data)} bytes, and a tensor starts {end} after the header.",
                _AGAIN,
            )
        return GgufHeader(metadata, tensors, types)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _skip(self, count: int) -> int:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise IndexError
        return start

    def _string(self) -> str:
        length = self._number("Q")
        start = self._skip(length)
        if length > _MOST_TEXT:
            raise _TooMuchError(f"a text of {length} bytes")
        return self._data[start : self._at].decode("utf-8")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _FIXED:
            return self._number(_FIXED[kind])
        if kind == _STRING:
            return self._string()
        # ``read_header`` makes an error of it: the header is damaged.
        if kind != _ARRAY or depth > _DEEPEST:
            raise IndexError
        inner, count = self._number("I"), self._number("Q")
        if count > _MOST_ITEMS:
            raise _TooMuchError(f"an array of {count} items")
        if inner in _FIXED:
            code = f"<{count}{_FIXED[inner]}"
            start = self._skip(struct.calcsize(code))
            if count <= _FEW:
                return struct.unpack_from(code, self._data, start)
            # As it is stored: a tuple of Python's numbers would take up to 40 times the file's bytes.
            return array(_FIXED[inner].replace("?", "B"), self._data[start : self._at])
        if inner == _STRING:
            return self._strings(count)
        if count > _FEW:
            raise _TooMuchError(f"{count} arrays in one")
        return tuple(self._value(inner, depth + 1) for _ in range(count))

    def _strings(self, count: int) -> StringArray:
        start = at = self._at
        unpack, data = struct.Struct("<Q").unpack_from, self._data
        for _ in range(count):
            # Length (u64), then the bytes: skipped undecoded, as a vocabulary has hundreds of thousands.
            at += 8 + unpack(data, at)[0]
        self._skip(at - start)
        if at - start > _MOST_TEXT:
            raise _TooMuchError(f"texts of {at - start} bytes")
        return StringArray(data[start:at], count)


def _check_values(header: GgufHeader, name: str) -> None:
    """Refuse values that their keys cannot have: a header that can be read to its end may be damaged all the same.

    This checks what polydraft and its plugins read; the limits are far beyond any model's.

    Raises:
        ModelFormatError: A value is of another kind, negative, or larger than any model's.
    """
    wrong = next(_impossible(header), None)
    if wrong is not None:
        key, value = wrong
        raise ModelFormatError(
            f"{name} is damaged: its GGUF header says {key} = {_shown(value)}.", "Download or convert it again."
        )


def _impossible(header: GgufHeader) -> Iterator[tuple[str, Any]]:
    """Each key with a value that it cannot have."""
    metadata, get = header.metadata, header.of_architecture
    for key in ("general.architecture", "tokenizer.ggml.model"):
        if not isinstance(metadata.get(key, ""), str):
            yield key, metadata[key]
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key in metadata and not isinstance(metadata[key], StringArray):
            yield key, metadata[key]
    if not _is_number(metadata.get("general.file_type", 0)):
        yield "general.file_type", metadata["general.file_type"]
    for key in _NUMBERS:
        value = get(key, 0)
        if not _is_number(value) or (key == "block_count" and value > _MOST_LAYERS):
            yield f"{header.architecture}.{key}", value
    for key in _BY_LAYER:
        value = get(key, 0)
        if not _is_number(value) and not (
            isinstance(value, tuple)
            and (key == _PATTERN or len(value) >= get("block_count", 0))
            and all(isinstance(item, bool) or _is_number(item) for item in value)
        ):
            yield f"{header.architecture}.{key}", value
    if get("attention.shared_kv_layers", 0) > get("block_count", _MOST_LAYERS):
        yield f"{header.architecture}.attention.shared_kv_layers", get("attention.shared_kv_layers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
