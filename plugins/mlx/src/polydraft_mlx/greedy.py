"""Choices at temperature 0, made where the logits are."""

from __future__ import annotations

import mlx.core as mx
from polydraft.contract import Sampler
from polydraft.sampling.on_device import DeviceChoice, device_choice

__all__ = ["GreedyDrafts", "greedy_choice"]


def greedy_choice(sampler: Sampler, first_position: int) -> DeviceChoice | None:
    """How a sampler chooses from a position on, if the largest logit is all that counts; else None."""
    choice = device_choice(sampler, first_position)
    return None if choice is None or choice.numbers is not None else choice


class GreedyDrafts:
    """The choices of one round, which no draft's step has to wait for: the whole round is evaluated at once.

    ``Sampler.choose_draft`` chooses in numpy on a CPU, and MLX hands each evaluation to another thread.
    """

    def __init__(self, choice: DeviceChoice, first_position: int) -> None:
        self._choice = choice
        self._first_position = first_position
        self._largest: list[mx.array] = []

    @classmethod
    def of(cls, sampler: Sampler, first_position: int) -> GreedyDrafts | None:
        """For the drafts from a position on; None where more than the largest logit counts."""
        choice = greedy_choice(sampler, first_position)
        return None if choice is None else cls(choice, first_position)

    def choose(self, logits: mx.array) -> mx.array:
        """The next draft, shape (1,), from logits (1, vocab)."""
        self._largest.append(logits.max(axis=-1))
        return mx.argmax(logits, axis=-1)

    def found(self, drafts: list[mx.array]) -> list[int]:
        """The ids of the drafts; tells the sampler of them."""
        token_ids, largest = mx.concatenate(drafts), mx.concatenate(self._largest)
        mx.eval(token_ids, largest)
        values: list[float] = largest.tolist()
        self._choice.drafted(self._first_position, values)
        chosen: list[int] = token_ids.tolist()
        return chosen
