"""Prompts of exact lengths in the target's own tokens, made from texts that vary with the run's seed.

A backend could be honest for prompts that it knows. So a run draws its words (some it makes up), its style and the few
kinds of text that it uses: no text of eight characters is in the prompts of all runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import TYPE_CHECKING

from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft import Session
    from polydraft.contract import Prompt

__all__ = ["PromptText", "WindowPrompt", "chats", "prompts_that_fit", "texts", "window_prompts"]

_WORDS = (
    *("item", "line", "key", "value", "name", "word", "file", "path", "list", "number", "count", "table", "row"),
    *("user", "order", "page", "node", "size", "text", "date", "price", "color", "event", "group", "index", "level"),
    *("month", "note", "owner", "part", "point", "query", "rate", "score", "shape", "state", "step", "tag", "task"),
    *("team", "time", "token", "tree", "type", "unit", "week", "year", "city", "book", "car", "day", "door", "fish"),
    *("game", "hand", "house", "job", "lake", "map", "month", "moon", "plant", "river", "road", "room", "sea", "shop"),
)
_VERBS = (
    *("read", "write", "count", "sort", "find", "add", "remove", "join", "split", "check", "parse", "load", "save"),
    *("print", "merge", "copy", "open", "close", "send", "move", "pack", "pick", "rank", "scan", "skip", "swap"),
    *("test", "trim", "wait", "walk", "apply", "build", "clean", "draw", "fill", "fold", "get", "hide", "keep", "make"),
)
_ADJECTIVES = (
    *("first", "last", "large", "small", "common", "empty", "sorted", "unique", "new", "old", "blue", "cold", "dark"),
    *("early", "fast", "full", "good", "high", "late", "long", "low", "main", "next", "open", "red", "safe", "short"),
)
_MODULES = ("os", "sys", "json", "math", "re", "time", "io", "csv", "ast", "abc", "copy", "enum", "glob", "heapq")
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "br", "st", "tr", "pl", "sk")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
_CODAS = ("", "", "n", "r", "l", "s", "t", "m")


class _Style:
    """What a run draws once: its words, its way of writing code, and the kinds of text that it uses."""

    def __init__(self, random: Random) -> None:
        self.random = random
        made_up = ["".join(self._syllable() for _ in range(random.choice((1, 2, 2, 3)))) for _ in range(12)]
        self.nouns = [*random.sample(sorted(set(_WORDS)), 12), *made_up[:8]]
        self.verbs = [*random.sample(_VERBS, 8), *made_up[8:]]
        self.adjectives = random.sample(_ADJECTIVES, 8)
        self.indent = random.choice(("  ", "    ", "\t", "   "))
        self.quotes = random.choice(('"""', "'''"))
        self.apart = random.choice(("\n", "\n\n"))
        self.code = random.sample((_loop, _collect, _short, _opened, _called, _class, _branch, _table, _counted), 3)
        self.prose = random.sample((_returns, _story, _listing, _how, _there), 2)
        self.asks = random.sample(_ASKS, 6)

    def _syllable(self) -> str:
        return "".join(self.random.choice(part) for part in (_ONSETS, _VOWELS, _CODAS))

    def noun(self) -> str:
        """A noun."""
        return self.random.choice(self.nouns)

    def two(self) -> list[str]:
        """Two nouns that differ."""
        return self.random.sample(self.nouns, 2)

    def verb(self) -> str:
        """A verb."""
        return self.random.choice(self.verbs)

    def adjective(self) -> str:
        """An adjective."""
        return self.random.choice(self.adjectives)

    def block(self, head: str, *lines: str, says: str = "") -> str:
        """A definition, with a docstring in half of the cases; a line begins with its depth."""
        docstring = [f"1{self.quotes}{says}{self.quotes}"] if says and self.random.random() < 0.5 else []
        body = (f"{self.indent * int(line[0])}{line[1:]}\n" for line in (*docstring, *lines))
        return f"{head}:\n{''.join(body)}"

    def function(self, parameters: str, *lines: str) -> str:
        """A function with a drawn name."""
        parts = self.random.sample([self.verb(), self.adjective(), self.noun()], self.random.choice((1, 2, 3)))
        return self.block(f"def {'_'.join(parts)}({parameters})", *lines, says=_sentence(self))


def texts(seed: int) -> tuple[str, ...]:
    """Texts of a run: Python code and English, the kind that the built-in models were trained on.

    The first has some thousand characters: long enough for every window and chunk of the built-in targets. It begins
    with a small letter or a sign, the second with a capital.
    """
    style = _Style(Random(f"polydraft texts {seed}"))  # a string seeds the same numbers in every process
    random = style.random
    code = style.apart.join(random.choice(style.code)(style) for _ in range(40))
    prose = " ".join(_sentence(style) for _ in range(5)) + " "
    imports = f"import {', '.join(random.sample(_MODULES, 3))}\n"
    return code, prose, f"{imports}{style.apart}{random.choice(style.code)(style)}"


def chats(seed: int) -> tuple[str, ...]:
    """A user's messages of a run, for the chat template."""
    style = _Style(Random(f"polydraft chats {seed}"))

    def one() -> str:
        (noun, other), module = style.two(), style.random.choice(_MODULES)
        asked = style.random.choice(style.asks)
        return asked.format(n=noun, o=other, v=style.verb(), a=style.adjective(), m=module)

    return tuple(dict.fromkeys(one() for _ in range(24)))


_ASKS = (
    "What does {m}.{v} do?",
    "Write a function that returns the {a} {n}.",
    "What is a {n}?",
    "How do I {v} a {n}?",
    "Say {n}.",
    "Name a {a} {n}.",
    "Is a {n} a {o}?",
    "Who can {v} the {n}?",
    "{v} the {a} {n}",
    "Tell me about {n} and {o}.",
    "Why is my {n} {a}?",
    "Give me a {n} for the {o}.",
    "Can {m} {v} a {n}?",
    "{n} or {o}?",
)


def _sentence(style: _Style) -> str:
    return style.random.choice(style.prose)(style)


def _returns(style: _Style) -> str:
    return f"Return the {style.adjective()} {style.noun()} of the {style.noun()}."


def _story(style: _Style) -> str:
    one, other = style.two()
    return f"A {one} can {style.verb()} the {style.adjective()} {other}, and its {style.noun()} too."


def _listing(style: _Style) -> str:
    return f"All of {', '.join(style.random.sample(style.nouns, 4))} are {style.adjective()}."


def _how(style: _Style) -> str:
    one, other = style.two()
    return f"To {style.verb()} a {one}, {style.verb()} its {other}: {style.random.randrange(100)} of them."


def _there(style: _Style) -> str:
    return f"My {style.noun()} is {style.adjective()}; no {style.noun()} will {style.verb()} it."


def _loop(style: _Style) -> str:
    one, other = style.two()
    return style.function(
        f"{one}s, {other}", f"1for {one} in {one}s:", f"2if {one} == {other}:", f"3return {one}", "1return None"
    )


def _collect(style: _Style) -> str:
    one, found = style.two()
    return style.function(
        f"{one}s", f"1{found} = []", f"1for {one} in {one}s:", f"2{found}.append({one}.{style.verb()}())"
    )


def _short(style: _Style) -> str:
    one, other = style.two()
    return style.function(f"{one}s, {other}", f"1return [{one} for {one} in {one}s if {one} != {other}]")


def _opened(style: _Style) -> str:
    one, other = style.two()
    return style.function(one, f"1with open({one}) as {other}:", f"2return {other}.read()")


def _called(style: _Style) -> str:
    one, other = style.two()
    return style.function(f"{one}, {other}", f"1{one}.{style.verb()}({other})", f"1return len({one})")


def _class(style: _Style) -> str:
    one, other = style.two()
    name = style.noun().capitalize()
    return style.block(
        f"class {name}", f"1def {style.verb()}(self, {one}):", f"2self.{one} = {one}", f"2return self.{other}"
    )


def _branch(style: _Style) -> str:
    one, other = style.two()
    number = style.random.randrange(1000)
    return style.block(f"if {one} > {number}", f"1{other} = {one} - {number}") + style.block(
        "else", f"1{other} = {style.verb()}({one})"
    )


def _table(style: _Style) -> str:
    one = style.noun()
    rows = (f"{style.indent}'{style.noun()}': {style.random.randrange(1000)},\n" for _ in range(4))
    return f"{one} = {{\n{''.join(rows)}}}\nprint({one})\n"


def _counted(style: _Style) -> str:
    one, other = style.two()
    return style.block(
        f"while {one} < {style.random.randrange(100)}", f"1{one} += 1", f"1{style.verb()}({one}, {other})"
    )


@dataclass(frozen=True, slots=True)
class WindowPrompt:
    """A prompt whose place relative to the sliding window is known."""

    place: str
    token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class PromptText:
    """The suite's text in a target's tokens."""

    start: tuple[int, ...]
    """BOS, where the model has one."""
    body: tuple[int, ...]

    @classmethod
    def of(cls, session: Session, seed: int) -> PromptText:
        """From any session of the target: it turns text into tokens."""
        code, prose, _ = texts(seed)
        room = session.running.context_length - 8  # of bytes, even where each is a token
        bare, whole = (
            session.generate(text, max_new_tokens=1, speculate="off").prompt_token_ids
            for text in (prose[:room], code[: min(600, room)])
        )
        # A first token that both share is BOS. (Only the prose begins with a capital.)
        start = whole[:1] if whole[0] == bare[0] else ()
        return cls(start, whole[len(start) :])

    def tokens(self, length: int, variant: int = 0) -> list[int]:
        """The first ``length`` tokens, the text repeated if needed; each variant begins elsewhere in the text."""
        # 37 has no divisor in common with most lengths, so that variants are far apart.
        first = 37 * variant % len(self.body)
        body = islice(cycle([*self.body[first:], *self.body[:first]]), length - len(self.start))
        return [*self.start, *body]


def window_prompts(prompt: Callable[[int], list[int]], window: int, *, quick: bool) -> tuple[WindowPrompt, ...]:
    """Prompts shorter than, across and past the sliding window, and in a full run one of a single token.

    ``shorter``: prompt and output stay inside the window. ``across``: the output crosses its edge. ``past``: the prompt
    is twice as long as the window, so that every row of its ring has been overwritten.

    Args:
        prompt: Gives a prompt of a length.
        window: The sliding window, in tokens.
        quick: Shorter outputs.
    """
    new_tokens = 24 if quick else 32
    lengths = [
        ("shorter", max(2, window // 4), max(4, window // 2)),
        ("across", max(2, window - 4), new_tokens),
        ("past", 2 * window + 3, new_tokens),
    ]
    if not quick:
        lengths.append(("single token", 1, new_tokens))
    return tuple(WindowPrompt(place, tuple(prompt(length)), min(count, new_tokens)) for place, length, count in lengths)


def prompts_that_fit(session: Session, seed: int, new_tokens: int) -> list[Prompt]:
    """The run's chats, where the model has a chat format, and those of its texts that fit into the context.

    Args:
        session: Any session of the target.
        seed: The run's.
        new_tokens: Room for the output.
    """
    found: list[Prompt] = []
    room = session.running.context_length - new_tokens
    try:
        for chat in chats(seed):
            messages = [{"role": "user", "content": chat}]
            if len(session.tokenizer.chat(messages)) <= room:
                found.append(messages)
    except UnsupportedError:
        pass  # no chat format: texts alone
    return [*found, *(text[:600] for text in texts(seed) if len(session.tokenizer.encode(text[:600])) < room)]
