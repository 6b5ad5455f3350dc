"""The vocabulary in a ``.litertlm`` file; texts become tokens in the engine."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from polydraft.checkpoints.litertlm import LitertlmFile, message_fields, read_section
from polydraft.checkpoints.special_tokens import SpecialTokens, turn_ends
from polydraft.errors import InvalidRequestError, ModelFormatError, UnsupportedError
from polydraft.files import parse_json
from polydraft.text.hub_tokenizer import decoder_is_byte_level, piece_bytes
from polydraft.text.prompt_format import FormattedTokenizer, PromptFormat, utf8

__all__ = ["LitertTokenizer", "Vocabulary", "read_vocabulary"]

_LARGEST = 1 << 28
"""Bytes of an unpacked tokenizer.json; the largest known has some 30 MB."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
"""Types of SentencePiece's tokens."""
_AGAIN = "Download or convert the file again."


class Vocabulary:
    """What each token adds to a text.

    Args:
        texts: By token id; empty where an id has no text.
        special: Ids of control tokens, whose texts are their names.
        names: A token as the file writes it -> its id.
        single_bytes: Ids of tokens that are one byte of a character.
    """

    def __init__(
        self, texts: Sequence[bytes], special: frozenset[int], names: Mapping[str, int], single_bytes: frozenset[int]
    ) -> None:
        self.texts, self.special, self.names, self.single_bytes = texts, special, names, single_bytes

    def join(self, token_ids: Sequence[int]) -> bytes:
        """The text of several tokens."""
        return b"".join(self.texts[token_id] for token_id in token_ids)

    @cached_property
    def by_text(self) -> dict[bytes, int]:
        """Text -> the one token that has it; texts that several tokens have are left out."""
        found: dict[bytes, int | None] = {}
        for token_id, text in enumerate(self.texts):
            if text and token_id not in self.single_bytes:
                found[text] = None if text in found else token_id
        return {text: token_id for text, token_id in found.items() if token_id is not None}


def read_vocabulary(file: LitertlmFile, name: str) -> Vocabulary:
    """The vocabulary of a file's tokenizer.

    Raises:
        ModelFormatError: It has none, or it is damaged.
    """
    section = file.section("hf_tokenizer", "sentencepiece")
    if section is None:
        raise ModelFormatError(f"{name} holds no tokenizer.", _AGAIN)
    data = read_section(file, section)
    try:
        found = _hub_vocabulary(data) if section.kind == "hf_tokenizer" else _sentencepiece_vocabulary(data)
    except (ValueError, TypeError, LookupError, AttributeError, zlib.error) as error:
        raise ModelFormatError(f"The tokenizer of {name} is damaged: {error}.", _AGAIN) from error
    if not found.texts:
        raise ModelFormatError(f"The tokenizer of {name} has no tokens.", _AGAIN)
    return found


class LitertTokenizer(FormattedTokenizer):
    """A ``polydraft.contract.Tokenizer``.

    Args:
        file: The model's file.
        vocabulary: Its vocabulary.
        encode: The engine's own tokenizer: a text -> token ids, nothing added.
    """

    def __init__(self, file: LitertlmFile, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        self.vocabulary = vocabulary
        self.engine_ids = encode
        self.vocab_size = len(vocabulary.texts)
        said = file.metadata
        start = self._sequence(said.start_token) if said.start_token is not None else ()
        self.start = start[0] if len(start) == 1 else None
        """The id that the engine puts before each prompt, if it does."""
        sequences = [found for token in said.stop_tokens if (found := self._sequence(token))]
        firsts = [found[0] for found in sequences if len(found) > 1 and found[0] in vocabulary.special]
        self.ends = tuple(dict.fromkeys([*(found[0] for found in sequences if len(found) == 1), *firsts]))
        """The ids at which the engine ends."""
        self.held_tokens = max((len(found) - 1 for found in sequences), default=0)
        """Tokens with which the engine waits at most, as they may begin a sequence at which it ends."""
        self.special_token_ids = vocabulary.special.union(self.ends)
        names = {"bos_token": self.start, "eos_token": self.ends[0] if self.ends else None}
        template = said.chat_template or _template(said.affixes)
        self._special = SpecialTokens(
            names={name: self.name(token) for name, token in names.items() if token is not None},
            eos_token_ids=frozenset(self.ends),
            chat_templates={"default": template} if template else {},
            # The engine begins each prompt with it, whatever the tokenizer does.
            needs_bos=self.start is not None,
        )

    @cached_property
    def _format(self) -> PromptFormat:
        return PromptFormat(self._special, self.token_id, self.encode, adds_bos=self.start is not None)

    @property
    def bos_token_id(self) -> int | None:
        """The id that the engine puts before each prompt."""
        return self.start

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids at which the engine ends, and known ends of a turn."""
        return frozenset(self.ends) | (turn_ends(self.token_id) & self.special_token_ids)

    def _sequence(self, token: tuple[int, ...] | int | str) -> tuple[int, ...]:
        """The ids of a token, or of a sequence, as the file writes it."""
        if isinstance(token, str):
            known = self.vocabulary.names.get(token)
            return (known,) if known is not None else tuple(self._ordinary(token))
        found = (token,) if isinstance(token, int) else token
        return found if all(0 <= token_id < self.vocab_size for token_id in found) else ()

    def name(self, token_id: int) -> str:
        """The text of a token."""
        return self.vocabulary.texts[token_id].decode("utf-8", "replace")

    @cached_property
    def _special_texts(self) -> re.Pattern[str] | None:
        texts = sorted(filter(None, map(self.name, self.special_token_ids)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens written in it are recognised.

        Raises:
            InvalidRequestError: The text cannot be written as UTF-8, or holds the character U+0000.
        """
        _check_text(text)
        found: list[int] = []
        at = 0
        for match in self._special_texts.finditer(text) if self._special_texts else ():
            found += self._ordinary(text[at : match.start()])
            token_id = self.token_id(match[0])
            found += self._ordinary(match[0]) if token_id is None else [token_id]
            at = match.end()
        return found + self._ordinary(text[at:])

    def _ordinary(self, text: str) -> list[int]:
        return self.engine_ids(text) if text else []

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token that is not the first one; of a special token, its name."""
        return self.vocabulary.texts[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name."""
        return self.vocabulary.names.get(token)

    # --- tokens and texts of a request ------------------------------------------------------------------------------
    def contents(self, token_ids: Sequence[int]) -> list[str]:
        """The texts from which the engine makes exactly these tokens: it takes no ids.

        Raises:
            UnsupportedError: There are none.
        """
        rest = list(token_ids)
        if self.start is not None:
            if rest[:1] != [self.start]:
                raise UnsupportedError(
                    f"LiteRT-LM begins every prompt with {self.name(self.start)!r}, and this one begins with another "
                    "token.",
                    f"Begin it with the id {self.start}, or give text.",
                )
            rest = rest[1:]
        return list(self._split(self._units(rest))) or [""]

    def _units(self, token_ids: Sequence[int]) -> list[list[int]]:
        """The tokens, those that share a character together."""
        units: list[list[int]] = []
        open_unit: list[int] = []
        for token_id in token_ids:
            open_unit.append(token_id)
            if _text(self.vocabulary.join(open_unit)) is not None:
                units.append(open_unit)
                open_unit = []
        if open_unit:
            raise self._unspoken(open_unit)
        return units

    def _split(self, units: Sequence[list[int]]) -> Iterator[str]:
        """Texts, as few as possible: first one for all, else of halves."""
        if not units:
            return
        wanted = [token_id for unit in units for token_id in unit]
        text = _text(self.vocabulary.join(wanted)) or ""
        # A text that begins with the start token's would get that token.
        begins = self.start is not None and text.startswith(self.name(self.start))
        if text and not begins and self._ordinary(text) == wanted:
            yield text
        elif len(units) == 1:
            raise self._unspoken(wanted)
        else:
            half = len(units) // 2
            yield from self._split(units[:half])
            yield from self._split(units[half:])

    def _unspoken(self, token_ids: Sequence[int]) -> UnsupportedError:
        shown = self.vocabulary.join(token_ids).decode("utf-8", "replace")
        return UnsupportedError(
            f"LiteRT-LM takes text, and its tokenizer makes other tokens of {shown!r} than {list(token_ids)}.",
            "Give the prompt as text.",
        )

    def is_whole(self, token_ids: Sequence[int]) -> bool:
        """Whether these tokens are all that one step of the engine emitted: it waits with parts of characters."""
        return not self.held_tokens and all(_text(self.vocabulary.texts[one]) is not None for one in token_ids)

    def unspoken_stop(self) -> int | None:
        """An id at which the engine ends and that no text gives it; None if there is none."""
        return next((end for end in self.ends if self._ordinary(self.name(end)) != [end]), None)

    def spelled(self, text: str) -> list[int]:
        """The tokens of a piece of the engine's output: the one token with that text, else what the tokenizer makes."""
        spelled = text.encode()
        single = self.vocabulary.by_text.get(spelled)
        if single is not None:
            return [single]
        found = self.encode(text)
        return found if self.vocabulary.join(found) == spelled else self._longest(spelled)

    def _longest(self, text: bytes) -> list[int]:
        """The tokens of a text from its start, each the longest that fits; single bytes where none does."""
        by_text, found, at = self.vocabulary.by_text, [], 0
        while at < len(text):
            size = next((size for size in range(min(len(text) - at, 64), 0, -1) if text[at : at + size] in by_text), 0)
            if size:
                found.append(by_text[text[at : at + size]])
            else:
                size = 1
                found.append(self._byte_ids.get(text[at], 0))
            at += size
        return found

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {self.vocabulary.texts[token_id][0]: token_id for token_id in self.vocabulary.single_bytes}


def _template(affixes: Mapping[str, tuple[str, str]]) -> str:
    """A chat template that puts the file's affixes around messages; empty without any."""
    if "user" not in affixes:
        return ""
    nothing = ("", "")
    roles = {
        "system": affixes.get("system", nothing),
        "user": affixes["user"],
        "assistant": affixes.get("model", nothing),
    }
    parts = [
        "{%- if message.role == " + _quoted(role) + " -%}{{- " + _quoted(before) + " -}}{{- message.content -}}"
        "{{- " + _quoted(after) + " -}}{%- endif -%}"
        for role, (before, after) in roles.items()
    ]
    opening = "{%- if add_generation_prompt -%}{{- " + _quoted(roles["assistant"][0]) + " -}}{%- endif -%}"
    return "{%- for message in messages -%}" + "".join(parts) + "{%- endfor -%}" + opening


def _quoted(text: str) -> str:
    """A string literal of Jinja."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _check_text(text: str) -> None:
    utf8(text)
    if "\0" in text:  # texts go to the engine as C strings
        raise InvalidRequestError("The text holds the character U+0000.", "Leave it out.")


def _text(spelled: bytes) -> str | None:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return None


def _hub_vocabulary(data: bytes) -> Vocabulary:
    """A tokenizer.json: its size in 64 bits, and its bytes, compressed."""
    unpack = zlib.decompressobj()
    text = unpack.decompress(data[8:], _LARGEST)
    if unpack.unconsumed_tail:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    given = parse_json(text.decode("utf-8"))
    listed = given["model"]["vocab"]
    names = dict(listed) if isinstance(listed, dict) else {entry[0]: index for index, entry in enumerate(listed)}
    added = {int(one["id"]): one for one in given.get("added_tokens") or ()}
    names.update({str(one["content"]): token_id for token_id, one in added.items()})
    byte_level = decoder_is_byte_level(given.get("decoder"))
    if not all(isinstance(token_id, int) and 0 <= token_id < 1 << 22 for token_id in names.values()):
        raise ValueError("an id is not a whole number")
    texts = [b""] * (max(names.values(), default=-1) + 1)
    for piece, token_id in names.items():
        texts[token_id] = piece.encode() if token_id in added else piece_bytes(piece, byte_level=byte_level)
    special = frozenset(token_id for token_id, one in added.items() if one.get("special"))
    single = frozenset(names[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in names)
    return Vocabulary(texts, special, names, frozenset() if byte_level else single - added.keys())


def _sentencepiece_vocabulary(data: bytes) -> Vocabulary:
    """A SentencePiece model: field 1 of the message is a token, with its text (1), score (2) and type (3)."""
    texts: list[bytes] = []
    names: dict[str, int] = {}
    special, single = set(), set()
    for field, value in message_fields(data):
        if field != 1 or not isinstance(value, bytes):
            continue
        parts = dict(message_fields(value))
        spelled, kind = parts.get(1, b""), parts.get(3, 1)
        piece = spelled.decode("utf-8", "replace") if isinstance(spelled, bytes) else ""
        token_id = len(texts)
        names.setdefault(piece, token_id)
        if kind in {_UNKNOWN, _CONTROL}:
            special.add(token_id)
        if kind == _BYTE:
            single.add(token_id)
        ordinary = kind not in {_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED}
        texts.append(piece_bytes(piece, byte_level=False) if ordinary else piece.replace("\u2581", " ").encode())
    return Vocabulary(texts, frozenset(special), names, frozenset(single))
