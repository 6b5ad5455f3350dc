"""The messages between an app and its worker, and how they are written: ``docs/worker-protocol.md`` describes them.

A frame is the length of its payload (4 bytes, big-endian) and the payload: one message as JSON. JSON, because pydantic,
which checks it, is here already, and is fast enough: see ``docs/adr/0009-workers.md``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, NoReturn
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from polydraft.contract.records import Record
from polydraft.contract.requests import OffReason, TokenRequest
from polydraft.contract.results import EndReason, GenerationStats, RunningInfo

__all__ = [
    "PROTOCOL_VERSION",
    "Answer",
    "Cancel",
    "Credit",
    "Ended",
    "Failure",
    "FrameError",
    "Frames",
    "Generate",
    "Hello",
    "Loaded",
    "LogLine",
    "Message",
    "Open",
    "Question",
    "RoundDone",
    "TokenizerFacts",
    "Warned",
    "frame",
    "records_digest",
    "spelled",
    "spelling",
]

PROTOCOL_VERSION = 2
"""Raised by every change that an older side would not understand. ``Hello`` is the same in all versions."""

_LENGTH = struct.Struct(">I")
_LONGEST = 1 << 30
"""Bytes of one frame: a longer one is no frame, but something else that was written to the pipe."""


class FrameError(Exception):
    """What was read is not the protocol's."""


class Message(BaseModel):
    """Base of all messages: frozen, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, ser_json_inf_nan="constants")


# From the app ---------------------------------------------------------------------------------------------------------


class Open(Message):
    """The first message of the app: which backend this worker is for."""

    kind: Literal["open"] = "open"
    protocol: int
    polydraft: str = Field(description="Version of the app's polydraft.")
    factory: str = Field(description="``module:Class`` of the backend.")
    name: str = Field(description="Its name.")
    levels: dict[str, int] = Field(default_factory=dict, description="Levels of the app's loggers; '' is the root's.")


class Question(Message):
    """A question, which one ``Answer`` of the same number follows."""

    kind: Literal["question"] = "question"
    number: int
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Generate(Message):
    """Start a call. Rounds follow, at most ``room`` of them before the first ``Credit``, and one ``Ended``."""

    kind: Literal["generate"] = "generate"
    call: int
    request: TokenRequest
    off: OffReason | None = None
    room: int
    levels: dict[str, int] | None = Field(default=None, description="As in ``Open``; None: unchanged.")


class Credit(Message):
    """The app has taken so many rounds of a call: as many more may follow."""

    kind: Literal["credit"] = "credit"
    call: int
    rounds: int


class Cancel(Message):
    """End a call as soon as possible; its ``Ended`` still follows."""

    kind: Literal["cancel"] = "cancel"
    call: int


# From the worker ------------------------------------------------------------------------------------------------------


class Hello(Message):
    """The first message of the worker. Fields that later versions add are ignored."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["hello"] = "hello"
    protocol: int
    polydraft: str
    records: int = Field(default=0, description="``records_digest`` of its polydraft.")
    python: str = ""


class Failure(Message):
    """One of polydraft's errors."""

    classes: tuple[str, ...] = Field(description="Its class and those that it derives from, the closest first.")
    message: str
    hint: str
    attributes: dict[str, Any] = Field(default_factory=dict)
    os_error: tuple[int, str, str | None] | None = Field(
        default=None, description="Number, text and file of the system's error that caused it."
    )
    traceback: str = Field(default="", description="Where it was raised, with its causes, as text.")


class Answer(Message):
    """The answer to a question: a value, or an error."""

    kind: Literal["answer"] = "answer"
    number: int
    value: Any = None
    error: Failure | None = None
    spelled: dict[int, str] = Field(default_factory=dict)


class RoundDone(Message):
    """One round of a call, as the engine emitted it."""

    kind: Literal["round"] = "round"
    call: int
    token_ids: tuple[int, ...]
    certain: bool = True
    all_certain: bool = Field(default=True, description="Whether the ids of all rounds so far are.")
    drafted: int | None
    accepted: int | None
    drafts: tuple[int, ...] | None = None
    reused: int | None = Field(default=None, description="Tokens of the prompt that were not run, where it is known.")
    seconds: float = Field(description="Since the round before; for the first one, since the call was begun.")
    logprobs: tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...] | None = None
    stats: GenerationStats | None = Field(default=None, description="The engine's own, with the last round.")
    last: bool = Field(default=False, description="Whether the output has ended.")
    spelled: dict[int, str] = Field(
        default_factory=dict, description="Bytes of tokens that the worker has not sent before, as Latin-1."
    )


class Ended(Message):
    """A call is over."""

    kind: Literal["ended"] = "ended"
    call: int
    error: Failure | None = None
    finish: EndReason | None = Field(default=None, description="Why the engine ended it, if tokens do not show it.")
    stats: GenerationStats | None = Field(default=None, description="The engine's own, with ``finish``.")


class LogLine(Message):
    """A log record."""

    kind: Literal["log"] = "log"
    name: str
    level: int
    message: str
    created: float
    path: str
    line: int
    function: str | None = None
    traceback: str = ""
    quiet: bool = Field(default=False, description="Not printed where the app has no handler: its library asks so.")


class Warned(Message):
    """A warning; ``call`` is the call that it was raised in, 0 in a question."""

    kind: Literal["warned"] = "warned"
    call: int
    classes: tuple[str, ...] = Field(description="Its category and those that it derives from.")
    message: str
    path: str
    line: int


# Values of answers ----------------------------------------------------------------------------------------------------


class TokenizerFacts(Message):
    """What the app knows of the tokenizer without asking."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    special_token_ids: frozenset[int]
    response_template: Any = None
    ids_only: bool = Field(description="There is none: the model takes token ids only.")
    text_only: bool = Field(default=False, description="There is none: the engine takes and gives text only.")


class Loaded(Message):
    """The answer to the question ``load``."""

    running: RunningInfo
    tokenizer: TokenizerFacts
    notes: tuple[str, ...] = ()
    checks_settings: bool = Field(description="Whether the engine is asked before each call what it refuses.")
    picks_k: bool = Field(description="``WholeEngine.picks_k``; a stepping engine's loop does.")
    shared_sequences: int = Field(description="The engine's.")
    shows_logits: bool = Field(description="Whether the question ``measure_tie`` can be asked.")


_FROM_APP = Annotated[Open | Question | Generate | Credit | Cancel, Field(discriminator="kind")]
_FROM_WORKER = Annotated[Hello | RoundDone | Answer | Ended | LogLine | Warned, Field(discriminator="kind")]


@cache
def _adapter(side: Literal["app", "worker"]) -> TypeAdapter[Any]:
    return TypeAdapter(_FROM_APP if side == "app" else _FROM_WORKER)


def records_digest() -> int:
    """A number for the names and fields of all messages and of the contract's records, which messages hold.

    Two sides of which it differs are of different code, though the protocol's version may be the same.
    """
    found, left = [], [Record, Message]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind.__module__.startswith(("polydraft.contract.", __name__)):
            found.append((kind.__name__, *sorted(kind.model_fields)))
    return crc32(repr(sorted(found)).encode())


def frame(message: Message) -> bytes:
    """The frame of a message.

    Raises:
        TypeError: It holds what JSON cannot say.
    """
    try:
        payload = message.model_dump_json().encode()
    except (PydanticSerializationError, UnicodeEncodeError):
        # A file's name that is not UTF-8 has lone surrogates in Python, which only ``json`` writes.
        payload = json.dumps(message.model_dump(mode="json")).encode()
    return _LENGTH.pack(len(payload)) + payload


class Frames:
    """Splits what is read from a pipe into messages.

    Args:
        side: Who writes them.
    """

    def __init__(self, side: Literal["app", "worker"]) -> None:
        self._adapter = _adapter(side)
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that ``data`` completes.

        Raises:
            FrameError: It is not of this protocol.
        """
        self._rest += data
        start = 0
        while len(self._rest) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._rest, start)
            if length > _LONGEST:
                _refuse(bytes(self._rest[start : start + 40]))
            end = start + _LENGTH.size + length
            if len(self._rest) < end:
                break
            payload = bytes(self._rest[start + _LENGTH.size : end])
            start = end
            yield self._message(payload)
        del self._rest[:start]

    def _message(self, payload: bytes) -> Any:
        try:
            return self._adapter.validate_json(payload)
        except ValidationError as error:
            try:  # lone surrogates, which only ``json`` reads
                return self._adapter.validate_python(json.loads(payload))
            except ValueError:
                raise FrameError(f"{payload[:80]!r}: {error.errors()[0]['msg']}") from error


def _refuse(data: bytes) -> NoReturn:
    raise FrameError(f"it begins with {data!r}")


def spelled(spellings: dict[int, bytes]) -> dict[int, str]:
    """Bytes of tokens as JSON can say them."""
    return {token_id: text.decode("latin-1") for token_id, text in spellings.items()}


def spelling(text: str) -> bytes:
    """The bytes again."""
    return text.encode("latin-1")
