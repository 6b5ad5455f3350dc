"""Steps on a CPU recorded as TorchScript: torch runs a small step's operations without Python between them.

They are the same operations in the same order, so the results have the same bits.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Traced"]

_USES = 40
"""A form that runs once more is recorded: that takes as long as about so many steps then save."""


class Traced:
    """Functions of tensors, each recorded for every form of its inputs. One thread uses it at a time."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, Any] = {}
        self._uses: Counter[Hashable] = Counter()

    def run(
        self, form: Hashable, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """``function(*inputs)``.

        Args:
            form: Names the function and all that its operations depend on but the sizes that they ask tensors for.
            function: Where it is recorded it runs twice, so running it again must change nothing. What is recorded
                keeps it.
            inputs: All tensors that differ from one call to the next.
        """
        recorded = self._recorded.get(form)
        if recorded is None:
            self._uses[form] += 1
            if self._uses[form] <= _USES:
                return function(*inputs)
            self._recorded[form] = recorded = _recorded(function, inputs)
        found: tuple[Tensor, ...] = recorded(*inputs)
        return found


def _recorded(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Any:
    """The function as TorchScript; as it is where torch or this Python has no TorchScript, which is slower."""
    with warnings.catch_warnings():
        # That it is old, and that sizes are taken for constants, which `form` names.
        warnings.simplefilter("ignore")
        try:
            return torch.jit.trace(function, tuple(inputs), check_trace=False)  # type: ignore[no-untyped-call]
        except (AttributeError, NotImplementedError):
            return function
