"""The header of a ``.litertlm`` file: what its sections are, without its weights.

The layout is that of LiteRT-LM (``schema/core/litertlm_header_schema.fbs``, ``runtime/proto/llm_metadata.proto``),
major version 1: the letters ``LITERTLM``, three 32-bit numbers for the version, four unused bytes, the end of the
header in 64 bits, and the header as a FlatBuffer. Numbers are little endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polydraft.checkpoints._flatbuffer import DamagedError, Table, root
from polydraft.errors import ModelFormatError
from polydraft.files import open_regular, system_errors

__all__ = [
    "DRAFTER_INSIDE",
    "MAGIC",
    "LitertlmFile",
    "LlmMetadata",
    "Section",
    "message_fields",
    "read_litertlm",
    "read_litertlm_config",
    "read_section",
]

MAGIC = b"LITERTLM"
DRAFTER_INSIDE = "polydraft_drafter"
"""Key of a config: the drafter that is part of the target's file, as ``{"kind": ..., "num_speculative_tokens": k}``."""
_MAJOR_VERSION = 1
_START = struct.Struct("<8sIII4xQ")
_LARGEST_HEADER = 1 << 24
_LARGEST_METADATA = 1 << 24
_MOST_SECTIONS = 1 << 10
_KINDS = (
    *("none", "binary", "deprecated", "tflite", "sentencepiece", "metadata", "hf_tokenizer", "weights"),
    *("executor_metadata",),
)
"""``AnySectionDataType``, by number."""
_STRING_VALUE = 9
"""Number of ``StringValue`` in the union ``VData``."""
_MODEL_TYPES = {2: "gemma3n", 3: "function_gemma", 4: "gemma3", 5: "qwen3", 7: "qwen2", 8: "gemma4", 13: "gemma3"}
"""``LlmModelType``, by the number of its field, as ``model_type`` of Transformers where that is known."""
_ROLES = {1: "user", 2: "model", 3: "system"}
_TARGETS = ("tf_lite_prefill_decode", "tf_lite_decode", "tf_lite_artisan_text_decoder")
_DRAFTER = "tf_lite_mtp_drafter"
_AGAIN = "Download or convert it again."


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the file."""

    kind: str
    """``tflite``, ``metadata``, ``hf_tokenizer``, ``sentencepiece``, ...; a number that is not known as ``type 12``."""
    model_type: str
    """What a TFLite model is for: ``tf_lite_prefill_decode``, ``tf_lite_mtp_drafter``, ...; else empty."""
    start: int
    end: int
    """Bytes of the file, from 0; the end is the first byte after it."""


@dataclass(frozen=True, slots=True)
class LlmMetadata:
    """What the file says about its language model. Texts of tokens are as the file has them."""

    start_token: int | str | None = None
    stop_tokens: tuple[tuple[int, ...] | str, ...] = ()
    """Each a sequence of ids, or a text."""
    max_num_tokens: int = 0
    """Context in tokens; 0: not said."""
    model_type: str = ""
    chat_template: str = ""
    """Jinja; empty: none."""
    affixes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Role (``user``, ``model``, ``system``) -> what stands before and after its messages, in place of a template."""
    min_runtime_version: str = ""


@dataclass(frozen=True, slots=True)
class LitertlmFile:
    """What the header of a file, and the small sections, say."""

    path: Path
    version: tuple[int, int, int]
    sections: tuple[Section, ...]
    metadata: LlmMetadata
    has_drafter: bool
    """Whether a drafter (MTP) is part of the file."""
    num_speculative_tokens: int | None
    """Drafts of a round, which the target's ``verify`` signature fixes; None without one."""
    cache_length: int | None
    """Rows of the KV cache; None: not fixed."""
    weights_dtype: str
    """``float32``, ``float16``, ``int8``, ...: the type of most of the target's weights; empty: not known."""

    def section(self, *kinds: str) -> Section | None:
        """The first section of one of these kinds."""
        return next((one for one in self.sections if one.kind in kinds), None)


def read_litertlm(path: Path, name: str = "") -> LitertlmFile:
    """Read a file's header, and check that the file reaches as far as its sections.

    Args:
        path: The file.
        name: The model's name, for the message; default: the path.

    Raises:
        ModelFormatError: It is no such file, of another version, cut short or damaged, or holds no language model.
    """
    name = name or str(path)
    with _mapped(path, name) as data:
        version, sections = _header(data, name)
        target = next((one for one in sections if one.kind == "tflite" and one.model_type in _TARGETS), None)
        if target is None:
            raise ModelFormatError(
                f"{name} holds no language model.", "Give a file that LiteRT-LM generates text with."
            )
        metadata = _metadata(data, sections)
        has_drafter = any(one.kind == "tflite" and one.model_type == _DRAFTER for one in sections)
        try:
            model = root(data[target.start : target.end])
            k, length = _verified_at_once(model), _cache_length(model)
            dtype = _weights_dtype(model)
        except DamagedError as error:
            raise ModelFormatError(f"{name} is damaged: its model cannot be read, {error}.", _AGAIN) from None
        return LitertlmFile(path, version, sections, metadata, has_drafter, k, length, dtype)


def read_litertlm_config(path: Path, name: str = "") -> dict[str, Any]:
    """The config of a file: what it says, under the keys of ``config.json``, and its drafter as ``DRAFTER_INSIDE``.

    Raises:
        ModelFormatError: As ``read_litertlm``.
    """
    found = read_litertlm(path, name)
    lengths = [length for length in (found.metadata.max_num_tokens, found.cache_length) if length]
    config: dict[str, Any] = {}
    if found.metadata.model_type:
        config["model_type"] = found.metadata.model_type
    if lengths:
        config["max_position_embeddings"] = min(lengths)
    if found.has_drafter and found.num_speculative_tokens:
        config[DRAFTER_INSIDE] = {"kind": "mtp", "num_speculative_tokens": found.num_speculative_tokens}
    return config


def read_section(file: LitertlmFile, section: Section) -> bytes:
    """The bytes of a section: a tokenizer, not weights.

    Raises:
        ModelFormatError: The file can no longer be read.
    """
    with _mapped(file.path, str(file.path)) as data:
        return bytes(data[section.start : section.end])


@contextmanager
def _mapped(path: Path, name: str) -> Iterator[memoryview]:
    try:
        with system_errors(f"{name} cannot be read"), open_regular(path) as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                raise ModelFormatError(f"{name} is not a LiteRT-LM file: it starts with {start!r}.", _AGAIN)
            # Mapped, not read: of gigabytes, a few pages are looked at. Unmapped once no slice of it is left.
            yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelFormatError(
            f"{name} cannot be read: {error.strerror or error}.", f"Check the file {path}."
        ) from error


def _header(data: memoryview, name: str) -> tuple[tuple[int, int, int], tuple[Section, ...]]:
    if len(data) < _START.size:
        raise _cut_short(name, len(data), _START.size)
    _, major, minor, patch, end = _START.unpack_from(data)
    if major != _MAJOR_VERSION:
        raise ModelFormatError(
            f"{name} is a LiteRT-LM file of version {major}.{minor}.{patch}, and polydraft reads version "
            f"{_MAJOR_VERSION}.",
            "Use a file of that version, or a newer polydraft.",
        )
    if end > len(data):
        raise _cut_short(name, len(data), end)
    if not _START.size < end <= _LARGEST_HEADER:
        raise ModelFormatError(f"{name} is damaged: its header ends at byte {end}.", _AGAIN)
    try:
        listed = root(data[_START.size : end]).table(1)
        tables = listed.tables(0) if listed is not None else []
        if len(tables) > _MOST_SECTIONS:
            raise DamagedError(f"{len(tables)} sections are more than any model's")
        sections = tuple(_section(table) for table in tables)
    except DamagedError as error:
        raise ModelFormatError(f"{name} is damaged: its header cannot be read, {error}.", _AGAIN) from None
    for section in sections:
        if not end <= section.start < section.end:
            raise ModelFormatError(
                f"{name} is damaged: a section goes from byte {section.start} to {section.end}.", _AGAIN
            )
        if section.end > len(data):
            raise _cut_short(name, len(data), section.end)
    return (major, minor, patch), sections


def _section(table: Table) -> Section:
    number = table.number(3, "B")
    items = [(item.text(0), item.table(2)) for item in table.tables(0) if item.number(1, "B") == _STRING_VALUE]
    texts = {key: value.text(0) for key, value in items if value is not None}
    return Section(
        kind=_KINDS[number] if number < len(_KINDS) else f"type {number}",
        model_type=texts.get("model_type", "").lower(),
        start=table.number(1, "Q"),
        end=table.number(2, "Q"),
    )


def _cut_short(name: str, size: int, needed: int) -> ModelFormatError:
    return ModelFormatError(f"{name} is cut short: it has {size} of {needed} bytes.", "Download it again.")


# --- the TFLite model -------------------------------------------------------------------------------------------------
_SUBGRAPHS, _SIGNATURES = 2, 7
_TENSORS, _GRAPH_INPUTS, _OPERATORS = 0, 1, 3
_DTYPES = {0: "float32", 1: "float16", 9: "int8", 17: "int4", 18: "bfloat16", 19: "int2"}
"""``TensorType`` of the TFLite schema."""


def _inputs(model: Table, signature: str) -> dict[str, list[int]] | None:
    """Name -> shape of the inputs of a signature; None without it."""
    for found in model.tables(_SIGNATURES):
        if found.text(2) != signature:
            continue
        graphs, number = model.tables(_SUBGRAPHS), found.number(4, "I")
        if number >= len(graphs):
            raise DamagedError(f"its signature {signature!r} belongs to graph {number} of {len(graphs)}")
        tensors, shapes = graphs[number].tables(_TENSORS), {}
        for entry in found.tables(0):
            index = entry.number(1, "I")
            if index >= len(tensors):
                raise DamagedError(f"an input of {signature!r} is tensor {index} of {len(tensors)}")
            shapes[entry.text(0)] = tensors[index].numbers(0, "i")
        return shapes
    return None


def _verified_at_once(model: Table) -> int | None:
    shape = (_inputs(model, "verify") or {}).get("input_pos", [])
    return shape[0] - 1 if shape and shape[0] > 1 else None


def _cache_length(model: Table) -> int | None:
    """The last dimension of the attention mask: one number for each row of the cache."""
    inputs = _inputs(model, "decode") or {}
    shape = inputs.get("mask") or inputs.get("attn_mask") or []
    return shape[-1] if shape and shape[-1] > 1 else None


def _weights_dtype(model: Table) -> str:
    """The type of most constants of the first graph: of what is neither an input nor made by an operator."""
    counts: dict[int, int] = {}
    for graph in model.tables(_SUBGRAPHS)[:1]:
        made = {*graph.numbers(_GRAPH_INPUTS, "i")}
        for operator in graph.tables(_OPERATORS):
            made.update(operator.numbers(2, "i"))
        for index, tensor in enumerate(graph.tables(_TENSORS)):
            shape = tensor.numbers(0, "i")
            if index in made or len(shape) < 2:
                continue
            count = 1
            for size in shape:
                count *= max(size, 0)
            kind = tensor.number(1, "b")
            counts[kind] = counts.get(kind, 0) + count
    largest = max(counts, key=lambda kind: counts[kind], default=-1)
    return _DTYPES.get(largest, "")


# --- LlmMetadata, a protobuf message ----------------------------------------------------------------------------------
def _metadata(data: memoryview, sections: tuple[Section, ...]) -> LlmMetadata:
    section = next((one for one in sections if one.kind == "metadata"), None)
    if section is None or section.end - section.start > _LARGEST_METADATA:
        return LlmMetadata()
    start: int | str | None = None
    stops: list[tuple[int, ...] | str] = []
    affixes: dict[str, tuple[str, str]] = {}
    length, texts, model_type = 0, {7: "", 14: ""}, ""
    for number, value in message_fields(bytes(data[section.start : section.end])):
        if isinstance(value, int):
            length = value if number == 5 else length
        elif number == 1:
            token = _token(value)
            start = token[0] if isinstance(token, tuple) else token
        elif number == 2:
            stops += [token] if (token := _token(value)) else []
        elif number == 3:
            affixes = {_ROLES[role]: _affixes(part) for role, part in _messages(value) if role in _ROLES}
        elif number == 6:
            model_type = next((_MODEL_TYPES.get(kind, "") for kind, _ in _messages(value)), "")
        elif number in texts:
            texts[number] = _text(value)
    return LlmMetadata(start, tuple(stops), length, model_type, texts[7], affixes, texts[14])


def message_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message: whole numbers, and bytes; fixed sizes as their bytes.

    It ends at what is no field: a part of a message that has been cut short.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            if at > len(data):
                return
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in {1, 5}:
            size = 8 if wire == 1 else 4
        else:
            return
        if at + size > len(data):
            return
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and the place after it, which is beyond the end where the number is cut short."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return value, len(data) + 1


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that are messages or texts."""
    return ((number, value) for number, value in message_fields(data) if isinstance(value, bytes))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _affixes(data: bytes) -> tuple[str, str]:
    found = dict(_messages(data))
    return _text(found.get(1, b"")), _text(found.get(2, b""))


def _token(data: bytes) -> tuple[int, ...] | str | None:
    """A ``TokenUnion``: a text, or ids; None if it is empty."""
    for number, value in _messages(data):
        if number == 1:
            return tuple(_ids(value)) or None
        if number == 2:
            return _text(value) or None
    return None


def _ids(data: bytes) -> Iterator[int]:
    """The ids of a ``TokenIds``, packed or one by one."""
    for number, value in message_fields(data):
        if number == 1 and isinstance(value, int):
            yield value
        elif number == 1 and isinstance(value, bytes):
            at = 0
            while at < len(value):
                token_id, at = _varint(value, at)
                yield token_id
