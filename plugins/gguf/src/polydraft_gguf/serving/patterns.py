r"""Regular expressions as GBNF, llama.cpp's grammars: those of JSON schemas, of formats, and whole outputs.

Beyond ASCII, dialects differ in `\d`, `\w`, `\s` and `.`. What is written here matches in all of them (ECMA-262, which
JSON Schema names; Python; Rust): each set has the characters that are in it everywhere, and those that may be, so that
a negated set is right, too. What a grammar cannot say (lookahead, back-references, word boundaries) is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, NoReturn

from polydraft.errors import InvalidRequestError, UnsupportedError

__all__ = ["FORMATS", "MOST_OPTIONAL", "MOST_REPEATED", "Pattern", "pattern_of"]

MOST_REPEATED = 1999
"""llama.cpp refuses grammars that repeat parts more often; some of its versions refuse 2000."""
MOST_OPTIONAL = 200
"""Parts that may be empty: of those in a row, llama.cpp needs a time for each token that grows with their cube."""
_DEEPEST = 100
"""Groups inside one another: llama.cpp reads them by recursion."""

_DAYS = (
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
)
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = f"(?:{_YEAR}-(?:{_DAYS})|{_LEAP}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": "^[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "ipv4": rf"^{_BYTE}(?:\.{_BYTE}){{3}}$",
}
"""Formats of JSON schemas that an expression says in full, without leap seconds."""

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_Ranges = list[tuple[int, int]]
"""Code points, as sorted ranges that do not touch, both ends included."""


class Pattern(NamedTuple):
    """A part of an expression."""

    text: str
    """In GBNF, as one symbol or a sequence of them."""
    least: int
    """Characters of the shortest match."""
    most: int | None
    """Of the longest one; None: without a bound."""
    rules: int
    """That llama.cpp makes of it: one for each group, and for each part that may come once more."""


class _Set(NamedTuple):
    """Characters that are in a set in every dialect, and those that are in one of them."""

    surely: _Ranges
    maybe: _Ranges

    def negated(self) -> _Set:
        return _Set(_others(self.maybe), _others(self.surely))

    def joined(self, other: _Set) -> _Set:
        return _Set(_sorted(self.surely + other.surely), _sorted(self.maybe + other.maybe))


def pattern_of(expression: str, *, quoted: bool) -> Pattern:
    """An expression in GBNF.

    Args:
        expression: The expression.
        quoted: It is searched in a JSON string, which the grammar writes with its quotes; ``^`` and ``$`` stand for the
            string's ends, and the rule ``char`` for any of its characters. False: it matches a whole output.

    Raises:
        InvalidRequestError: It is malformed, or nothing matches it.
        UnsupportedError: A grammar cannot say it.
    """
    return _Reader(expression, quoted).whole()


class _Reader:
    def __init__(self, expression: str, quoted: bool) -> None:
        self._given, self._at, self._quoted, self._depth = expression, 0, quoted, 0
        self._optional = 0

    def whole(self) -> Pattern:
        found = self._alternatives()
        if self._at < len(self._given):
            self._malformed("a parenthesis that nothing opened")
        return Pattern(rf'"\"" {found.text} "\""', *found[1:]) if self._quoted else found

    def _alternatives(self) -> Pattern:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._malformed(f"groups inside one another that are more than {_DEEPEST} deep")
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        self._depth -= 1
        longest = [part.most for part in parts]
        most = None if None in longest else max(one for one in longest if one is not None)
        text = f"({' | '.join(part.text for part in parts)})"
        return Pattern(text, min(part.least for part in parts), most, 1 + sum(part.rules for part in parts))

    def _sequence(self) -> Pattern:
        outer = self._depth == 1
        free = Pattern("char*", 0, None, 1)
        parts = [] if (outer and self._take("^")) or not (outer and self._quoted) else [free]
        ended = False
        while self._at < len(self._given) and self._given[self._at] not in "|)":
            if outer and self._take("$"):
                ended = True
                if self._at < len(self._given) and self._given[self._at] not in "|)":
                    self._unwritable("`$` before its end")
                break
            parts.append(self._repeated(self._atom()))
        if outer and self._quoted and not ended:
            parts.append(free)
        longest = [part.most for part in parts]
        most = None if None in longest else sum(one for one in longest if one is not None)
        text = " ".join(part.text for part in parts) or '""'
        return Pattern(text, sum(part.least for part in parts), most, sum(part.rules for part in parts))

    def _repeated(self, part: Pattern) -> Pattern:
        found = re.compile(r"[*+?]|\{(\d{1,9})(,?)(\d{0,9})\}").match(self._given, self._at)
        if found is None:
            return part
        self._at = found.end()
        self._take("?")  # How much is tried first does not change what matches.
        if self._at < len(self._given) and self._given[self._at] in "*+?":
            self._unwritable("a possessive or doubled quantifier")
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[0], (int(found[1] or 0), None))
        if found[1] is not None and not (found[2] and not found[3]):
            most = int(found[3]) if found[2] else least
        if most is not None and most < least:
            self._malformed(f"the repetition {found[0]}")
        if max(part.rules, 1) * max(least, most or 1) > MOST_REPEATED:
            self._unwritable(f"more than {MOST_REPEATED} parts, with what is repeated")
        if most != 1 and not part.least:
            self._unwritable("a repetition of what may be empty")
        self._optional += least == 0
        if self._optional > MOST_OPTIONAL:
            self._unwritable(f"more than {MOST_OPTIONAL} parts that may be empty")
        longest = 0 if most == 0 else None if most is None or part.most is None else part.most * most
        text = '""' if most == 0 else f"{part.text}{{{least},{'' if most is None else most}}}"
        return Pattern(text, part.least * least, longest, part.rules + (1 if most is None else most - least))

    def _atom(self) -> Pattern:
        character = self._next()
        if character == "(":
            if self._take("?") and not self._take(":"):
                name = re.compile(r"P?<[A-Za-z_]\w*>").match(self._given, self._at)
                if name is None:
                    self._unwritable("a group with `(?` that is no plain one, such as lookahead or flags")
                self._at = name.end()
            found = self._alternatives()
            if not self._take(")"):
                self._malformed("a parenthesis that nothing closes")
            return found
        if character == "[":
            return self._one(self._class())
        if character == ".":
            return self._one(_ANY)
        if character == "\\":
            return self._one(self._escaped())
        if character in "*+?{":
            self._malformed(f"`{character}` with nothing to repeat; a literal one needs a backslash")
        if character in "^$":
            self._unwritable(f"`{character}` inside it")
        return self._one(_only(ord(character)))

    def _class(self) -> _Set:
        negated, found, first = self._take("^"), _Set([], []), True
        while first or not self._take("]"):
            first = False
            if self._given.startswith(("[:", "&&", "--", "~~"), self._at):
                self._unwritable("a named class, or an operation on classes")
            part = self._class_part()
            if self._given.startswith("-", self._at) and not self._given.startswith("-]", self._at):
                self._at += 1
                end = self._class_part()
                low, high = (one.surely[0] if one.surely else (0, 0) for one in (part, end))
                if low[0] != low[1] or high[0] != high[1] or len(part.surely) != 1 or len(end.surely) != 1:
                    self._malformed("a range between what are no characters")
                if high[0] < low[0]:
                    self._malformed("a range that ends before it begins")
                part = _Set([(low[0], high[0])], [(low[0], high[0])])
            found = found.joined(part)
        return found.negated() if negated else found

    def _class_part(self) -> _Set:
        character = self._next()
        if character in "[]":
            # Empty classes, `[` in a class: dialects differ.
            self._unwritable(f"`{character}` in a class without a backslash")
        return self._escaped() if character == "\\" else _only(ord(character))

    def _escaped(self) -> _Set:
        character = self._next()
        if character in "dwsDWS":
            known = _classes()[character.lower()]
            return known if character.islower() else known.negated()
        if character in _CONTROLS:
            return _only(_CONTROLS[character])
        code = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})").match(self._given, self._at - 1)
        if code is not None:
            self._at = code.end()
            number = int(code[1] or code[2], 16)
            if _SURROGATES[0] <= number <= _SURROGATES[1]:
                self._unwritable("half of a surrogate pair")
            return _only(number)
        if character.isalnum() or character == "_" or not character.isascii():
            self._unwritable(f"`\\{character}`")
        return _only(ord(character))

    def _one(self, among: _Set) -> Pattern:
        """One character of a set."""
        # A NUL ends texts in llama.cpp's grammars; in JSON it is an escape.
        parts, plain = [], [(max(first, 1), last) for first, last in among.surely if last]
        if not self._quoted and among.surely and not plain:
            self._unwritable("the character U+0000")
        if self._quoted:
            plain = []
            for first, last in among.surely:
                begin = first
                for code in [code for code in _ESCAPED if first <= code <= last]:
                    parts.append(f'"{_in_json(code)}"')
                    plain += [(begin, code - 1)] if begin < code else []
                    begin = code + 1
                plain += [(begin, last)] if begin <= last else []
        if plain:
            parts.append(f"[{''.join(_range(first, last) for first, last in plain)}]")
        if not parts:
            self._malformed("a class that no character is in")
        return Pattern(parts[0] if len(parts) == 1 else f"({' | '.join(parts)})", 1, 1, int(len(parts) > 1))

    def _next(self) -> str:
        if self._at == len(self._given):
            self._malformed("no end")
        self._at += 1
        return self._given[self._at - 1]

    def _take(self, character: str) -> bool:
        if not self._given.startswith(character, self._at):
            return False
        self._at += 1
        return True

    def _malformed(self, what: str) -> NoReturn:
        raise InvalidRequestError(
            f"The expression {self._given[:80]!r} in `guided` has {what}.", "Correct it.", argument="guided"
        )

    def _unwritable(self, what: str) -> NoReturn:
        raise UnsupportedError(
            f"The expression {self._given[:80]!r} in `guided` has {what}, which llama.cpp's server cannot force.",
            "Write it without, or use the backend llama_cpp.",
        )


def _sorted(ranges: _Ranges) -> _Ranges:
    found: _Ranges = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _others(ranges: _Ranges) -> _Ranges:
    found, begin = [], 1  # no NUL, which grammars cannot have
    for first, last in _sorted([*ranges, _SURROGATES]):
        if begin < first:
            found.append((begin, first - 1))
        begin = last + 1
    return [*found, (begin, _LAST)] if begin <= _LAST else found


def _only(code: int) -> _Set:
    return _Set([(code, code)], [(code, code)])


@lru_cache(maxsize=1)
def _classes() -> dict[str, _Set]:
    """What a letter after a backslash stands for."""
    digits = _sorted([(code, code) for code in range(0x20000) if chr(code).isdecimal()])
    words = [(48, 57), (65, 90), (95, 95), (97, 122)]
    spaces = [(9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F)]
    spaces += [(0x205F, 0x205F), (0x3000, 0x3000)]
    return {
        "d": _Set([(48, 57)], digits),
        "w": _Set(words, [*words, (0x80, _LAST)]),
        "s": _Set(spaces, _sorted([*spaces, (0x1C, 0x1F), (0x85, 0x85), (0xFEFF, 0xFEFF)])),
    }


_ANY = _Set(_others([(10, 10), (13, 13), (0x2028, 0x2029)]), [])
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}
_ESCAPED = [*range(0x20), ord('"'), ord("\\"), 0x7F]
"""Code points that a JSON string has as escapes."""


def _in_json(code: int) -> str:
    """The escape of a character in a JSON string, in a literal of GBNF."""
    short = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: r"\"", 92: r"\\"}.get(code)
    return rf"\\{short}" if short else rf"\\u{code:04x}"


def _range(first: int, last: int) -> str:
    return _code(first) if first == last else f"{_code(first)}-{_code(last)}"


def _code(code: int) -> str:
    character = chr(code)
    if character.isascii() and character.isalnum():
        return character
    return rf"\x{code:02X}" if code < 0x100 else rf"\u{code:04X}" if code < 0x10000 else rf"\U{code:08X}"
