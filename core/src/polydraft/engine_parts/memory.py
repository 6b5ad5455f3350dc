"""What a pair takes on its device: said before it is loaded, and refused where more is asked for than is free."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydraft._numbers import as_size
from polydraft.checkpoints._kv_bytes import kv_bytes
from polydraft.engine_parts._context import context_length
from polydraft.errors import OutOfMemoryError

if TYPE_CHECKING:
    from polydraft.contract.requests import LoadRequest

__all__ = ["MemoryEstimate", "expected_tokens", "kv_bytes"]

_log = logging.getLogger("polydraft.progress.memory")
_SAID_FROM = 2**30
"""Bytes: a pair that takes less fits everywhere, and is told to those alone who listen for details."""
_USUAL_TOKENS = 4096


def expected_tokens(request: LoadRequest) -> int:
    """Tokens that room is counted for where KV grows with the text: the caller's context, or a usual one.

    Raises:
        ContextLengthError: As ``context_length``.
    """
    longest = context_length(request)
    return min(longest, _USUAL_TOKENS) if request.context_length is None else longest


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a pair takes on its device, by what they hold; what an engine takes without a model is not counted."""

    weights: int
    """Target and drafter, in the dtype that they are loaded in."""
    kv: int
    """Keys and values of one sequence of ``tokens`` tokens."""
    tokens: int
    work: int = 0
    """What a prompt takes on top of it while it is run."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.work

    def announce(self, request: LoadRequest, place: str, free: int | None) -> None:
        """Say what is needed and what is free, in the log ``polydraft.progress.memory``, which the command line shows.

        Args:
            request: What is being loaded.
            place: The device's name.
            free: Bytes that are free on it; None: not known.
        """
        parts = [
            f"{as_size(self.weights)} of weights",
            f"{as_size(self.kv)} for the KV of {self.tokens} tokens",
            *([f"{as_size(self.work)} to run a prompt"] if self.work else []),
        ]
        listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
        level = logging.INFO if self.total >= _SAID_FROM else logging.DEBUG
        known = "" if free is None else f"; {as_size(free)} are free"
        _log.log(level, "%s needs about %s on %s: %s%s", request.target.id, as_size(self.total), place, listed, known)

    def check_fits(self, request: LoadRequest, place: str, free: int) -> None:
        """Refuse weights, or a context that the caller asks for, that are larger than what is free.

        The arguments are those of ``announce``; what is free is known.

        Raises:
            OutOfMemoryError: They are.
        """
        if self.weights > free:
            raise OutOfMemoryError(
                f"The weights need about {as_size(self.weights)}, and {place} has {as_size(free)} free.",
                "Choose a smaller model, or `dtype='bfloat16'`.",
            )
        kept = request.prefix_cache_bytes or 0
        if request.context_length is not None and self.weights + self.kv + kept > free:
            also = f" and `prefix_cache_bytes={kept}`" if kept else ""
            raise OutOfMemoryError(
                f"A context of {self.tokens} tokens{also} needs about {as_size(self.kv + kept)} next to "
                f"{as_size(self.weights)} of weights, and {place} has {as_size(free)} free.",
                f"Give a smaller `context_length`{' or `prefix_cache_bytes`' if kept else ''}.",
            )
