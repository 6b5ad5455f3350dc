"""Sequences of finished calls, kept so that the next prompt that begins like one of them need not run it again.

What a prompt has in common with a kept sequence is compared token by token, so a reused KV is that of the same tokens
at the same positions. The sequence goes with the prompt that takes it: one of two threads that want it takes it, and
the other one prefills.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft import hardware
from polydraft._loop.returned import checked_count, defect
from polydraft.contract.requests import PREFIX_CACHE_BYTES, TokenRequest
from polydraft.errors import OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polydraft.contract.records import Capabilities
    from polydraft.contract.stepping import EngineSequence, SteppingEngine

__all__ = ["KeptSequences"]

_MOST_KEPT = 64
"""Sequences kept at most, however small they are: each is compared with every new prompt."""
_NOT_OF_KV = frozenset(
    (
        *("prompt_token_ids", "settings", "seed", "stream", "speculate", "num_speculative_tokens"),
        *("least_speculative_tokens", "eos_token_ids", "max_total_tokens"),
    )
)
"""The fields of a request on which the KV of a token does not depend. Requests that differ in any other one share
none."""
_OF_KV = tuple(name for name in TokenRequest.model_fields if name not in _NOT_OF_KV)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    sequence: EngineSequence
    token_ids: tuple[int, ...]
    """Those that it stores."""
    prefilled: int
    """How many of them prefills have run."""
    decides: tuple[Any, ...]
    """What else decides the KV of a token: see ``_deciding``."""


class KeptSequences:
    """The kept sequences of one engine, the least recently used first.

    Args:
        engine: Opens sequences.
        capabilities: What its backend claims: nothing is kept for one that does not claim ``reuses_prefixes``.
        limit: Bytes that kept sequences may hold, 0: nothing is kept; None: ``PREFIX_CACHE_BYTES``, or half of what is
            free of the host's memory, if the engine runs there and that is less.
    """

    def __init__(self, engine: SteppingEngine, capabilities: Capabilities, limit: int | None) -> None:
        self._engine = engine
        self._on_host = limit is None and engine.running.device == "cpu"
        self._limit = PREFIX_CACHE_BYTES if limit is None else limit
        if not capabilities.reuses_prefixes:
            self._limit = 0
        self._bitwise = engine.running.exactness == "bitwise"
        # Reentrant: the garbage collector may end a call at any point. No method that may wait for an engine is called
        # while it is held.
        self._lock = threading.RLock()
        self._kept: list[_Kept] = []
        self._open = 0  # sequences of calls that are under way
        self._closed = False

    def open(self, request: TokenRequest) -> tuple[EngineSequence, int]:
        """A sequence for a request, and how many tokens of its prompt it stores: 0 of a new one.

        Raises:
            EngineError: The engine cannot open one, or go back to what it says that can be reused.
        """
        with self._lock:
            taken, reused = self._take(request)
            most = self._engine.max_sequences
            surplus: list[_Kept] = []
            if taken is None and most is not None:
                surplus = self._kept[: max(0, len(self._kept) + self._open + 1 - most)]
                del self._kept[: len(surplus)]
            self._open += 1
        try:
            _close(surplus)
            if taken is None:
                return self._engine.open_sequence(), 0
            try:
                taken.sequence.rollback(reused)
            except BaseException:
                taken.sequence.close()
                raise
            return taken.sequence, reused
        except BaseException:
            with self._lock:
                self._open -= 1
            raise

    def _take(self, request: TokenRequest) -> tuple[_Kept | None, int]:
        """The kept sequence that saves this request most, and how many of its tokens; None if none saves enough."""
        # While an engine is asked, a call that ends in this thread may close none of those that are looked at.
        found, self._kept = self._kept, []
        try:
            best, most = None, 0
            for kept in reversed(found):  # of equals the one that was used last
                reusable = self._reusable(kept, request)
                if reusable > most:
                    best, most = kept, reusable
            if best is not None and not self._is_worth_it(best, most, request):
                best, most = None, 0
            found = [kept for kept in found if kept is not best]
        finally:
            self._kept = [*found, *self._kept]
        return best, most

    def _reusable(self, kept: _Kept, request: TokenRequest) -> int:
        prompt = request.prompt_token_ids
        # The last token is run again: its logits choose the first new one.
        common = min(_common(kept.token_ids, prompt), len(prompt) - 1)
        if self._bitwise:
            common = min(common, kept.prefilled)
        if common < 1 or kept.decides != _deciding(request):
            return 0
        reusable = checked_count(kept.sequence.reusable(common), "reusable()") or 0
        if reusable > common:
            raise defect(f"Asked for the first {common} tokens, reusable() answered {reusable}.")
        return reusable

    def _is_worth_it(self, kept: _Kept, reused: int, request: TokenRequest) -> bool:
        """Whether a prompt takes a sequence, whose further tokens its own conversation then has to run again.

        Two prompts that have only a few words in common at their start leave each other's sequences alone.
        """
        lost = len(kept.token_ids) - reused
        alone = self._engine.max_sequences == 1  # then it would be closed for a new one
        return alone or reused >= lost or 2 * reused >= len(request.prompt_token_ids)

    def keep(self, sequence: EngineSequence, request: TokenRequest, token_ids: Sequence[int], prefilled: int) -> None:
        """Keep a sequence of this engine that stores ``token_ids``, or close it; a prefill ran ``prefilled`` of them.

        Raises:
            EngineError: The engine cannot close a sequence.
        """
        kept = _Kept(sequence, tuple(token_ids), prefilled, _deciding(request))
        wanted = False
        try:
            most = min(len(token_ids), prefilled) if self._bitwise else len(token_ids)
            if self._limit and sequence.reusable(most) > 0:
                sequence.cancelled = None  # it would keep the call alive
                sequence.park()
                wanted = True
        except OutOfMemoryError:
            pass
        finally:
            with self._lock:
                self._open -= 1
                if wanted and not self._closed:
                    self._kept.append(kept)
                    surplus = self._surplus()
                else:
                    surplus = [kept]
            _close(surplus)

    def discard(self, sequence: EngineSequence) -> None:
        """Close a sequence of this engine that may store anything."""
        with self._lock:
            self._open -= 1
        sequence.close()

    def _surplus(self) -> list[_Kept]:
        """What exceeds the limits, removed, the least recently used first."""
        sizes = [kept.sequence.held_bytes for kept in self._kept]
        total, count = sum(sizes), max(0, len(sizes) - _MOST_KEPT)
        limit = self._limit
        if self._on_host and total:
            # At most half of what would be free without them.
            limit = min(limit, (total + hardware.free_memory()) // 2)
        total -= sum(sizes[:count])
        while count < len(sizes) and total > limit:
            total -= sizes[count]
            count += 1
        surplus, self._kept = self._kept[:count], self._kept[count:]
        return surplus

    def clear(self) -> bool:
        """Close all that are kept, and return whether there were any. Calls under way are not concerned."""
        with self._lock:
            kept, self._kept = self._kept, []
        _close(kept)
        return bool(kept)

    def close(self) -> None:
        """Close all that are kept, and keep none from now on. May be called twice."""
        self._closed = True
        self.clear()


def _deciding(request: TokenRequest) -> tuple[Any, ...]:
    """What decides the KV of a token, besides the tokens up to it."""
    return tuple(getattr(request, name) for name in _OF_KV)


def _close(sequences: Iterable[_Kept]) -> None:
    """Close all of them, each even if one before fails."""
    with ExitStack() as steps:
        for kept in sequences:
            steps.callback(kept.sequence.close)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Number of leading tokens that two sequences share."""
    equal, unequal = 0, min(len(one), len(other)) + 1  # they share ``equal`` tokens, and fewer than ``unequal``
    while unequal - equal > 1:
        # Slices are compared in C: the whole takes about as long as two of them.
        middle = (equal + unequal) // 2
        if one[equal:middle] == other[equal:middle]:
            equal = middle
        else:
            unequal = middle
    return equal
