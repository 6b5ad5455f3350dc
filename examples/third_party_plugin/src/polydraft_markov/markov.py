"""The engine: a Markov model of bytes, with its own loop. It does not know polydraft.

A model's weights are a text: how often each byte followed the bytes before it. Documents of the text are separated by
an empty line; ``END`` ends each of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

VERSION = "0.1.0"
END = 256
VOCAB_SIZE = 257

Logits = npt.NDArray[np.float32]
Choose = Callable[[Logits, int], int]
"""From the logits, of shape (VOCAB_SIZE,), and the position of the token to be chosen, to that token."""


class Markov:
    """Predicts a byte from up to ``order`` bytes before it (interpolated as by Witten and Bell 1991)."""

    def __init__(self, text: str, order: int) -> None:
        self.order = order
        tokens = [token for document in text.strip().split("\n\n") for token in (*document.encode(), END)]
        counts: dict[tuple[int, ...], Any] = defaultdict(lambda: np.zeros(VOCAB_SIZE))
        for index, token in enumerate(tokens):
            for length in range(min(order, index) + 1):
                counts[tuple(tokens[index - length : index])][token] += 1
        self._counts = dict(counts)

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> Self:
        """A model of a folder, from its parsed ``config.json``: the file ``text``, and ``order``."""
        return cls((folder / config["text"]).read_text(encoding="utf-8"), int(config["order"]))

    def logits(self, context: Sequence[int]) -> Logits:
        """Log-probabilities of the token after ``context``, of shape (VOCAB_SIZE,)."""
        probabilities = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)
        for length in range(min(self.order, len(context)) + 1):
            counts = self._counts.get(tuple(context[len(context) - length :]))
            if counts is None:
                break
            distinct = np.count_nonzero(counts)
            probabilities = (counts + distinct * probabilities) / (counts.sum() + distinct)
        logits: Logits = np.log(probabilities).astype(np.float32)
        return logits


def sampler(temperature: float, seed: Sequence[int]) -> Choose:
    """The engine's own way to choose: greedy, or with noise that depends on seed and position only."""

    def choose(logits: Logits, position: int) -> int:
        if temperature == 0:
            return int(logits.argmax())
        noise = np.random.default_rng([*seed, position]).gumbel(size=VOCAB_SIZE)
        return int((logits / temperature + noise).argmax())

    return choose


@dataclass(frozen=True)
class Output:
    """The tokens that one round of ``generate`` adds: accepted drafts, then the target's own token."""

    tokens: list[int]
    drafted: int


def generate(
    target: Markov, drafter: Markov | None, prompt: Sequence[int], k: int, limit: int, choose: Choose
) -> Iterator[Output]:
    """Generate ``limit`` tokens, with k drafts per round; the first round, which reads the prompt, drafts nothing."""
    tokens = list(prompt)
    end = len(prompt) + limit
    while len(tokens) < end:
        drafts: list[int] = []
        most = min(k, end - len(tokens) - 1) if len(tokens) > len(prompt) else 0
        while drafter is not None and len(drafts) < most:
            drafts.append(choose(drafter.logits([*tokens, *drafts]), len(tokens) + len(drafts)))
        new: list[int] = []
        for draft in [*drafts, None]:
            new.append(choose(target.logits([*tokens, *new]), len(tokens) + len(new)))
            if new[-1] != draft:
                break
        tokens += new
        yield Output(new, len(drafts))
