"""Prompts of exact lengths, made from the suite's own text in the target's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft import Session

__all__ = ["CHATS", "TEXTS", "PromptText", "WindowPrompt", "window_prompts"]

TEXTS = (
    '''def read_lines(path, *, encoding="utf-8"):
    """Return the lines of a file, without their ends."""
    with open(path, encoding=encoding) as file:
        return [line.rstrip("\\n") for line in file]


def write_lines(path, lines, *, encoding="utf-8"):
    """Write the lines to a file, each with its end."""
    with open(path, "w", encoding=encoding) as file:
        for line in lines:
            file.write(line + "\\n")


class Counter(dict):
    """Count how often each key was seen."""

    def __missing__(self, key):
        return 0

    def update(self, keys):
        """Count every one of the keys."""
        for key in keys:
            self[key] += 1

    def most_common(self, n=None):
        """Return the n most common keys with their counts, the most common first."""
        items = sorted(self.items(), key=lambda item: item[1], reverse=True)
        return items if n is None else items[:n]

    def total(self):
        """Return the sum of all counts."""
        return sum(self.values())
''',
    "Return the number of items. The list is sorted, and the items are counted: one, two, three, four, five, six. ",
    'import os\nimport sys\n\n__all__ = ["walk", "main"]\n\n\ndef walk(top):\n    for name in os.listdir(top):\n',
)
"""Raw texts. The first is long enough for every window of the built-in targets."""

CHATS = (
    "What does os.path.join do?",
    "Write a function that returns the larger of two numbers.",
    "What is a list?",
    "Say hello.",
)
"""A user's message, for the chat template."""


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
    def of(cls, session: Session) -> PromptText:
        """From any session of the target: it turns text into tokens."""
        bare, whole = (
            session.generate(text, max_new_tokens=1, speculate="off").prompt_token_ids for text in (TEXTS[1], TEXTS[0])
        )
        # A first token that both share is BOS.
        start = whole[:1] if whole[0] == bare[0] else ()
        return cls(start, whole[len(start) :])

    def tokens(self, length: int) -> list[int]:
        """The first ``length`` tokens, the text repeated if needed."""
        return [*self.start, *islice(cycle(self.body), length - len(self.start))]


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
