"""Prompts for a verification, in the target's own tokens, the most telling ones first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from polydraft.errors import PolydraftError

if TYPE_CHECKING:
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["PlannedCase", "own_cases", "planned_cases", "sliding_window"]

_CHAT = "Write a short function that counts how often each word occurs in a text, and explain it."
_TEXTS = {
    "code": '''def count_words(text):
    """Return how often each word occurs in the text."""
    counts = {}
    for word in text.lower().split():
        word = word.strip(".,;:!?")
        if word:
            counts[word] = counts.get(word, 0) + 1
    return counts


def most_common(counts, number):
    """Return the words that occur most often, with their counts."""
    pairs = sorted(counts.items(), key=lambda pair: pair[1], reverse=True)
    return pairs[:number]


def total(counts):
    """Return the number of all words."""
    return sum(counts.values())
''',
    "prose": "A language model writes one word after another. Each time it reads everything that was written before, "
    "and asks which word is likely to come next. A second, smaller model can guess several words at once, and the "
    "larger one then looks at all of the guesses together. It keeps those that it would have written itself, and goes "
    "on from the first that it would not. So the text is the same, and only the time is shorter. ",
    "a list": "1. one apple\n2. two pears\n3. three plums\n4. four cherries\n5. five apples\n6. six pears\n7. seven ",
}
_TEMPERATURES = (0.8, 1.0, 0.6)
_FIRST_LENGTHS = {"code": 48, "prose": 24, "a list": 40}
_NO_WINDOW = 256
"""Half of a long prompt's length, in tokens, where the target's config names no sliding window."""


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """One prompt, with its sampling settings."""

    prompt: str
    token_ids: tuple[int, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


def sliding_window(config: dict[str, Any]) -> int | None:
    """The sliding window of a target's config, in tokens; None if it has none."""
    text = config.get("text_config", config)
    window = text.get("sliding_window") if isinstance(text, dict) else None
    return window if isinstance(window, int) and window > 0 else None


def planned_cases(
    tokenizer: Tokenizer, window: int | None, context_length: int, *, seeds: bool
) -> Iterator[tuple[int, PlannedCase]]:
    """An endless sequence of prompts, each with the number of the pass over them.

    Args:
        tokenizer: The tokenizer of the target.
        window: The target's sliding window.
        context_length: Prompts leave half of it to the output.
        seeds: Whether seeded samples can be compared.

    Yields:
        In the first pass: a chat and short texts, greedy and sampled, then prompts longer than the sliding window and
        ones whose output crosses its edge. In later passes: other seeds, or other pieces of the texts.
    """
    most = context_length // 2
    chat = _chat(tokenizer)
    if getattr(tokenizer, "text_only", False) and len(chat) > most:
        chat = ()  # the engine lays it out by itself: it cannot be cut
    texts = {name: _tokens(tokenizer, text, index) for index, (name, text) in enumerate(_TEXTS.items())}
    # Past twice the window, so that a ring buffer has wrapped around, and not at a multiple of it.
    long = (window or _NO_WINDOW) * 2 + 3
    lengths = [("past the sliding window" if window else "long", long)]
    if window:
        # The prompt ends 8 tokens before the edge: the output crosses it within its first rounds.
        lengths.append(("across the sliding window's edge", max(2, window - 8)))
    for number in range(1 << 30):
        short: list[PlannedCase] = []
        if number == 0 and chat:
            short.append(PlannedCase("a chat", chat[:most]))
        short += [
            PlannedCase(name, _piece(text, min(_FIRST_LENGTHS[name], most), number)) for name, text in texts.items()
        ]
        longer = [PlannedCase(name, _piece(texts["code"], min(length, most), number)) for name, length in lengths]
        sampled = [
            # There are fewer than 17 cases in a pass, so every seed differs.
            PlannedCase(case.prompt, case.token_ids, {"temperature": temperature, "seed": 17 * number + index})
            for index, (case, temperature) in enumerate(zip([*short, *longer], cycle(_TEMPERATURES), strict=False))
            if seeds
        ]
        greedy = [*short, *longer]
        # Greedy and sampled alternate, the short prompts first: what is cheap comes first.
        order = [case for pair in zip(greedy, sampled, strict=True) for case in pair] if sampled else greedy
        for case in order:
            yield number, case


def own_cases(prompts: Sequence[tuple[str, tuple[int, ...]]], *, seeds: bool) -> Iterator[tuple[int, PlannedCase]]:
    """Cases of the caller's own prompts, for ever: (number of the pass, case), as those of ``planned_cases``.

    Args:
        prompts: What each is called, and its token ids.
        seeds: Whether seeded samples can be compared: each prompt is then decoded greedily and sampled.
    """
    for number in range(1 << 30):
        for index, (name, token_ids) in enumerate(prompts):
            yield number, PlannedCase(name, token_ids)
            if seeds:
                sampling = {
                    "temperature": _TEMPERATURES[index % len(_TEMPERATURES)],
                    "seed": len(prompts) * number + index,
                }
                yield number, PlannedCase(name, token_ids, sampling)


def _tokens(tokenizer: Tokenizer, text: str, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the start of every prompt, the text's tokens); arbitrary tokens where the model has no tokenizer."""
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    try:
        return start, tuple(tokenizer.encode(text))
    except PolydraftError:
        # Multiples of a prime are spread over the vocabulary.
        count = tokenizer.vocab_size
        return start, tuple((7919 * position + 104729 * index) % count for position in range(97))


def _piece(text: tuple[tuple[int, ...], tuple[int, ...]], length: int, number: int) -> tuple[int, ...]:
    """``length`` tokens of a text, repeated if needed; each ``number`` starts at another place."""
    start, body = text
    first = 11 * number % len(body)
    return (*start, *islice(cycle(body), first, first + max(1, length - len(start))))


def _chat(tokenizer: Tokenizer) -> tuple[int, ...]:
    messages: Sequence[dict[str, str]] = [{"role": "user", "content": _CHAT}]
    try:
        return tuple(tokenizer.chat(messages))
    except PolydraftError:  # no chat template
        return ()
