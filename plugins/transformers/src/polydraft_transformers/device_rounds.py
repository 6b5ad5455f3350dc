"""Rounds that run on a GPU without the host: one recorded launch for drafts, verification and choices, and the next.

The drafts and choices of a round come back in one small copy. The device counts what was accepted, and from that makes
the state that the next round starts from, so the GPU works while the host emits tokens. If the host then asks for
another round than the one that ran ahead, because the output ended or the caller went back, what ran is forgotten:
rows beyond ``KvCache.length`` hold nothing.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from polydraft.sampling.on_device import DeviceChoice, device_choice
from torch import Tensor

from polydraft_transformers.kv_cache import capacity_at
from polydraft_transformers.step_choice import STATE, Kind, choose, kind_of, noise_keys, state_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Sampler

    from polydraft_transformers.decoder import Decoder
    from polydraft_transformers.kv_cache import KvCache

__all__ = ["DeviceRounds", "Drafting", "Ran"]

_UNSOUND = -1  # in place of a token, by the contract of ``Sampler.choose``
_OWN_ROUND = 3
"""A k that is asked for so often gets a round of its own; until then a recorded one with more drafts serves it."""


class Drafting(Protocol):
    """Drafts of a round, in operations that can be recorded."""

    def __call__(self, state: Tensor, hidden: Tensor, k: int, kind: Kind, span: int) -> tuple[Tensor, Tensor]:
        """The drafts after the newest token.

        Args:
            state: Of the round.
            hidden: The target's hidden row before the newest token, (1, hidden_size).
            k: Number of drafts.
            kind: Of the choices.
            span: Slots of the full layers that are attended.

        Returns:
            The drafts, int64, and the largest logit of each, float32: both (k,).
        """
        ...


class Logits(Protocol):
    """The target's head."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden rows (rows, hidden_size) to logits (rows, vocab)."""
        ...


@dataclass(frozen=True, slots=True)
class Ran:
    """A round that has run, on the host."""

    choice: DeviceChoice
    position: int
    """Of the newest token."""
    newest: int
    drafts: list[int]
    largest: list[float]
    """Of each draft's logits."""
    chosen: list[int]
    """The target's choices after the newest token and after each draft; -1 from a row that is not sound."""
    hidden: Tensor
    """Final-normed hidden rows of the newest token and the drafts."""

    def answers(self, token_ids: Sequence[int], position: int, sampler: Sampler) -> bool:
        """Whether a step of these tokens has been run by this round; a single row that is not sound runs again."""
        drafts = list(token_ids[1:])
        return (
            self.choice.sampler is sampler
            and (self.position, self.newest) == (position, token_ids[0])
            and self.drafts[: len(drafts)] == drafts
            and len(drafts) <= len(self.drafts)
            and (bool(drafts) or self.chosen[0] != _UNSOUND)
        )


class _Launched:
    """A round that is under way.

    Args:
        k: Its drafts.
        outputs: Of the recorded round, which the next launch overwrites.
        host: Where its result arrives.
    """

    def __init__(self, k: int, outputs: tuple[Tensor, ...], host: Tensor) -> None:
        result, self.next_state, self.next_hidden, rows = outputs
        self.k = k
        self.hidden = rows.clone()
        self._host = host
        self._arrived: Any = None
        host[: len(result)].copy_(result, non_blocking=True)
        if result.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> tuple[list[int], list[int], list[float]]:
        """Drafts, choices and the drafts' largest logits."""
        if self._arrived is not None:
            self._arrived.synchronize()
        k = self.k
        values = self._host[: 3 * k + 1].tolist()
        return (
            values[:k],
            values[k : 2 * k + 1],
            list(struct.unpack(f"{k}d", struct.pack(f"{k}q", *values[2 * k + 1 :]))),
        )


class DeviceRounds:
    """The rounds of one sequence.

    Args:
        target: The target; it captures its steps.
        cache: The sequence's.
        logits: The target's head.
        drafting: Drafts; None: rounds without drafts, plain steps, alone.
    """

    def __init__(self, target: Decoder, cache: KvCache, logits: Logits, drafting: Drafting | None) -> None:
        self._target = target
        self._cache = cache
        self._logits = logits
        self._drafting = drafting
        device = target.device
        most = 3 * target.step_rows + 1
        pinned = device.type == "cuda"
        self._host = [torch.empty(most, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._given = torch.empty(STATE, dtype=torch.int64, pin_memory=pinned)
        self._choice: DeviceChoice | None = None
        self._ahead: _Launched | None = None
        self._expected = (0, 0)  # position and newest token of the round that runs ahead
        self._asked: Counter[int] = Counter()
        self._last_k: int | None = None

    def forget(self) -> None:
        """Drop the round that runs ahead: the sequence goes on in another way."""
        self._ahead = self._last_k = None

    def run(self, newest: int, k: int, sampler: Sampler, hidden: Tensor) -> Ran | None:
        """The round of ``newest`` and k drafts, or of more drafts than that: it may have run already.

        Args:
            newest: The token at position ``length``.
            k: Drafts asked for.
            sampler: The generation's.
            hidden: The target's hidden row before it, (1, hidden_size); not read without drafts.

        Returns:
            None if the host must take part in it, or if the step crosses the end of a span.
        """
        position = self._cache.length
        # This round, and the next one, which may run ahead.
        self._cache.wrote(position + 2 * self._target.step_rows)
        if self._choice is None or self._choice.sampler is not sampler:
            self.forget()
            self._choice = device_choice(sampler, position + 1)
        choice, span = self._choice, capacity_at(position)
        if choice is None:
            self.forget()
            return None
        launched, self._ahead = self._ahead, None
        if launched is None or not self._serves(launched.k, k) or self._expected != (position, newest):
            k_run = self._k_to_run(k, kind_of(choice), span)
            if position + k_run >= span:
                self.forget()
                return None
            self._given.copy_(torch.tensor(state_of(choice, newest, position)))
            state = self._given.to(self._target.device, non_blocking=True)
            launched = self._replay(k_run, span, choice, state, hidden)
        # A shorter round comes before the end of the output; one plain step may be one among rounds with drafts.
        goes_on = k == launched.k and (k == self._last_k or (k > 0 and self._last_k is None))
        # Wherever this round ends, the next one must not cross the span's end.
        if goes_on and position + 2 * k + 1 < span:
            self._ahead = self._replay(k, span, choice, launched.next_state, launched.next_hidden)
        self._last_k = k
        drafts, chosen, largest = launched.wait()
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == chosen[accepted]:
            accepted += 1
        self._expected = position + accepted + 1, chosen[accepted]
        if chosen[accepted] == _UNSOUND and self._ahead is not None:
            # Its rows may hold NaN, which masked slots would pass on.
            self._ahead = None
            self._cache.zero(position, 2 * self._target.step_rows)
        return Ran(choice, position, newest, drafts, largest, chosen, launched.hidden)

    def _serves(self, k: int, asked: int) -> bool:
        """Whether a round of k drafts gives one of ``asked`` with the same bits: its step has as many rows."""
        return k >= asked if asked or self._target.fixed else k == 0

    def _k_to_run(self, k: int, kind: Kind, span: int) -> int:
        recorded: list[int] = [name[1] for name in self._cache.captured_names(span) if name[::2] == ("round", kind)]
        serving = [other for other in recorded if self._serves(other, k)]
        if k in recorded or not serving or self._asked[k] >= _OWN_ROUND - 1:
            return k
        self._asked[k] += 1
        return min(serving)

    def _replay(self, k: int, span: int, choice: DeviceChoice, state: Tensor, hidden: Tensor) -> _Launched:
        kind = kind_of(choice)

        def recorded(state: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
            return self._round(state, hidden, k, kind, span)

        outputs = self._cache.captured(("round", k, kind), span, recorded, state, hidden)(state, hidden)
        self._host.reverse()
        return _Launched(k, outputs, self._host[0])

    def _round(self, state: Tensor, hidden: Tensor, k: int, kind: Kind, span: int) -> tuple[Tensor, ...]:
        """A round in operations that can be recorded.

        Returns:
            The result, int64: drafts, choices, and the bits (float64) of the drafts' largest logits. The next round's
            state and hidden row. The hidden rows of the newest token and the drafts.
        """
        target, cache = self._target, self._cache
        drafts, largest = state[:0], hidden.new_empty(0, dtype=torch.float32)
        if k:
            assert self._drafting is not None
            drafts, largest = self._drafting(state, hidden, k, kind, span)
        rows = target.step_rows if target.fixed or k else 1
        token_ids, positions, slots, row_of_token = rows_of_step(state, drafts, rows, fixed=target.fixed)
        cache.begin_step(positions, span, slots)
        found = target.network.run(target.run_ids(token_ids), cache)
        chosen, most = choose(self._logits(found), noise_keys(state, positions), state, kind)
        row_of_token = row_of_token[: k + 1]
        chosen = torch.where(most.isfinite(), chosen, _UNSOUND)[row_of_token]
        found = found[row_of_token]
        accepted = (drafts == chosen[:k]).long().cumprod(0).sum(0, keepdim=True)
        # What follows a row that is not sound is not used: token 0 stands for it.
        following = torch.cat([chosen[accepted].clamp(min=0), state[1:2] + accepted + 1, state[2:]])
        result = torch.cat([drafts, chosen, largest.double().view(torch.int64)])
        return result, following, found[accepted], found


def rows_of_step(state: Tensor, drafts: Tensor, rows: int, *, fixed: bool) -> Tensor:
    """The rows of the step that verifies drafts, as ``TransformersSequence.run_step`` lays them out.

    Args:
        state: Of the round.
        drafts: Int64, shape (k,).
        rows: Of the step, at least k + 1.
        fixed: Whether a position decides its row.

    Returns:
        Int64, shape (4, rows): tokens, positions, slots, and the row of each token.
    """
    position = state[1]
    index = torch.arange(rows, device=state.device)
    order, row_of_token = (index - position) % rows, (index + position) % rows
    if not fixed:
        order = row_of_token = index
    own = order.clamp(max=len(drafts))  # padding rows run copies of the last token
    return torch.stack([torch.cat([state[:1], drafts])[own], position + own, position + order, row_of_token])
