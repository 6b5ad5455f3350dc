"""Prompts of exact lengths in the target's own tokens, made from texts that vary with the run's seed."""

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

_NOUNS = (
    *("item", "line", "key", "value", "name", "word", "file", "path", "list", "number", "count", "table", "row"),
    *("user", "order", "page", "node", "size", "text", "date"),
)
_VERBS = (
    *("read", "write", "count", "sort", "find", "add", "remove", "join", "split", "check", "parse", "load", "save"),
    *("print", "merge", "copy", "open", "close"),
)
_ADJECTIVES = ("first", "last", "largest", "smallest", "common", "empty", "sorted", "unique", "new", "old")
_RETURNS = ("None", "a list", "the number of items", "True if there is one", "a new string", "the sum of all values")


def texts(seed: int) -> tuple[str, ...]:
    """Texts of a run: Python code and English about it, the kind that the built-in models were trained on.

    The first has some thousand characters: long enough for every window and chunk of the built-in targets.
    """
    random = Random(f"polydraft texts {seed}")  # a string seeds the same numbers in every process
    code = "\n\n".join(_function(random) for _ in range(24))
    prose = " ".join(_sentence(random) for _ in range(3)) + " "
    imports = "".join(f"import {name}\n" for name in random.sample(["os", "sys", "json", "math", "re", "time"], 3))
    return code, prose, f"{imports}\n\n{_function(random)}"


def chats(seed: int) -> tuple[str, ...]:
    """A user's messages of a run, for the chat template."""
    random = Random(f"polydraft chats {seed}")

    def one() -> str:
        noun, verb, adjective = random.choice(_NOUNS), random.choice(_VERBS), random.choice(_ADJECTIVES)
        asks = (
            f"What does {random.choice(['os.path', 'str', 'list', 'dict', 'math'])}.{verb} do?",
            f"Write a function that returns the {adjective} {noun}.",
            f"What is a {noun}?",
            f"How do I {verb} a {noun}?",
            f"Say {noun}.",
        )
        return random.choice(asks)

    return tuple(dict.fromkeys(one() for _ in range(16)))


def _function(random: Random) -> str:
    """A short function with its docstring."""
    noun, other = random.sample(_NOUNS, 2)
    verb, adjective = random.choice(_VERBS), random.choice(_ADJECTIVES)
    bodies = (
        f"    for {noun} in {noun}s:\n        if {noun} == {other}:\n            return {noun}\n    return None\n",
        f"    found = []\n    for {noun} in {noun}s:\n        found.append({noun}.{verb}())\n    return found\n",
        f"    return [{noun} for {noun} in {noun}s if {noun} != {other}]\n",
        f"    with open({noun}) as {other}:\n        return {other}.read()\n",
        f"    {noun}.{verb}({other})\n    return len({noun})\n",
    )
    says = f"{verb.capitalize()} the {adjective} {noun}, and return {random.choice(_RETURNS)}."
    return f'def {verb}_{adjective}_{noun}({noun}s, {other}):\n    """{says}"""\n{random.choice(bodies)}'


def _sentence(random: Random) -> str:
    noun, other = random.sample(_NOUNS, 2)
    return (
        f"Return the {random.choice(_ADJECTIVES)} {noun} of the {other}: {', '.join(random.sample(_NOUNS, 4))}. "
        f"To {random.choice(_VERBS)} the {noun}, {random.choice(_VERBS)} its {other}."
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
        # A first token that both share is BOS. (The code begins with "def", the prose with "Return".)
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
