"""Prompts of exact lengths, made from the suite's own text in the target's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polydraft import Session

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = ["CHATS", "TEXTS", "WindowPrompt", "prompt_of_length", "window_prompts"]

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
"""What a user says, for the chat template."""


@dataclass(frozen=True, slots=True)
class WindowPrompt:
    """A prompt whose place relative to the sliding window is known."""

    place: str
    token_ids: tuple[int, ...]
    max_new_tokens: int


def prompt_of_length(suite: Suite, session: Session, case: Case, length: int) -> tuple[int, ...]:
    """The first tokens of the suite's text (repeated if need be), BOS first where the model has one.

    Args:
        suite: Keeps the text's tokens.
        session: Any session of the case's target: it turns text into tokens.
        case: Whose target's tokens are wanted.
        length: Number of tokens.
    """
    key = ("text", case.pair)
    if key not in suite.cache:
        bare, whole = (
            session.generate(text, max_new_tokens=1, speculate="off").prompt_token_ids for text in (TEXTS[1], TEXTS[0])
        )
        # What both begin with is BOS, if anything.
        start = whole[:1] if whole[0] == bare[0] else ()
        suite.cache[key] = (start, whole[len(start) :])
    start, body = suite.cache[key]
    return (*start, *islice(cycle(body), length - len(start)))


def window_prompts(suite: Suite, session: Session, case: Case) -> tuple[WindowPrompt, ...]:
    """Prompts shorter than, across and past the sliding window, and one of a single token.

    ``shorter``: prompt and output stay inside the window. ``across``: the output crosses its edge. ``past``: the prompt
    is twice as long as the window, so that every row of its ring has been overwritten.
    """
    window, new_tokens = case.pair.window, 24 if suite.options.quick else 32
    lengths = [
        ("shorter", max(2, window // 4), max(4, window // 2)),
        ("across", max(2, window - 4), new_tokens),
        ("past", 2 * window + 3, new_tokens),
    ]
    if not suite.options.quick:
        lengths.append(("single token", 1, new_tokens))
    return tuple(
        WindowPrompt(place, prompt_of_length(suite, session, case, length), min(count, new_tokens))
        for place, length, count in lengths
    )
