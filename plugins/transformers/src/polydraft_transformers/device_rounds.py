"""Rounds that run on a GPU without the host: one recorded launch for drafts, verification and choices, and the next.

Sequences that ask at the same time share a launch: each has a lane, as many rows as the others', and its own state.
The drafts and choices of a round come back in one small copy. The device counts what was accepted, and from that makes
the states that the next round starts from, so the GPU works while the host emits tokens. While it does, the sequences
ask for what they do next. If that is another round than the one that ran ahead, because the output ended or the caller
went back, what ran is forgotten: rows beyond ``KvCache.length`` hold nothing. A sequence that does not ask in time is
left out of the next launch, and may join a later one.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from polydraft.sampling.on_device import DeviceChoice, device_choice
from torch import Tensor

from polydraft_transformers.device_clock import stamp
from polydraft_transformers.experts import MOST_ROWS
from polydraft_transformers.graphs import Captured
from polydraft_transformers.shared_caches import SharedCaches
from polydraft_transformers.step_choice import Kind, accepted_by_chance, choose, kind_of, noise_keys, state_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Sampler

    from polydraft_transformers.decoder import Decoder
    from polydraft_transformers.kv_cache import KvCache

__all__ = ["MOST_LANES", "DeviceRounds", "Drafting", "Lane", "Ran"]

MOST_LANES = 16
"""Sequences that share a launch at most."""
_TIMES = 4  # of a round that is timed: its start, and the ends of drafts, of the target's forward, and of its choices
_UNSOUND = -1  # in place of a token, by the contract of ``Sampler.choose``
_OWN_ROUND = 3
"""A k that is asked for so often gets a round of its own; until then a recorded one with more drafts serves it."""
_PATIENCE = 0.001
"""Seconds that a launch waits for the sequences of the last one, while the GPU is idle."""
_LOOK = 0.0002
"""Seconds between looks at what the GPU is working on."""


class Drafting(Protocol):
    """Drafts of a round, in operations that can be recorded."""

    def draft(self, state: Tensor, hidden: Tensor, k: int, kind: Kind, cache: SharedCaches) -> tuple[Tensor, Tensor]:
        """The drafts after each sequence's newest token.

        Args:
            state: Of the round, (sequences, ``STATE``).
            hidden: The target's hidden row before each newest token, (sequences, hidden_size).
            k: Number of drafts.
            kind: Of the choices.
            cache: The sequences' caches.

        Returns:
            The drafts, int64, and the largest logit of each, float32: both (sequences, k).
        """
        ...


@dataclass(frozen=True, slots=True)
class Ran:
    """A sequence's round that has run, on the host."""

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


@dataclass(eq=False, slots=True)
class _Ask:
    """A round that a sequence waits for."""

    lane: Lane
    cache: KvCache
    """The lane's."""
    choice: DeviceChoice
    newest: int
    position: int
    k: int
    hidden: Tensor
    goes_on: bool
    """Whether a round of as many drafts is likely to follow."""
    ran: Ran | None = None

    @property
    def kind(self) -> Kind:
        """Of the choices."""
        return kind_of(self.choice)._replace(chance=self.lane.chance, timed=self.lane.seconds is not None)


class Lane:
    """A sequence's part of the rounds.

    Args:
        rounds: Of the target.
        cache: The sequence's.
    """

    def __init__(self, rounds: DeviceRounds, cache: KvCache) -> None:
        self.cache: KvCache | None = cache
        self.chance: float | None = None
        """As of ``EngineSequence.accept_by_chance``."""
        self.seconds: list[float] | None = None
        """As of ``EngineSequence.part_seconds``, from its first call on."""
        self.way = 0
        """Counts how often the sequence went another way than its rounds."""
        self.expected = (0, 0)
        """Position and newest token of the round after the last one that is known."""
        self.found: tuple[int, Ran] | None = None
        """A round that ran before it was asked for, and the way it belongs to."""
        self._rounds = rounds
        self._choice: DeviceChoice | None = None
        self._last_k: int | None = None

    def forget(self) -> None:
        """Drop what runs ahead: the sequence goes on in another way."""
        self.way += 1
        self.found = self._last_k = None

    def close(self) -> None:
        """What runs ahead is not used, and the cache is not kept alive."""
        self.forget()
        self.cache = None

    def run(self, newest: int, k: int, sampler: Sampler, hidden: Tensor) -> Ran | None:
        """The round of ``newest`` and k drafts, or of more drafts than that: it may have run already.

        Args:
            newest: The token at position ``length``.
            k: Drafts asked for.
            sampler: The generation's.
            hidden: The target's hidden row before it, (1, hidden_size); not read without drafts.

        Returns:
            None if the host must take part in it.
        """
        cache = self.cache
        assert cache is not None
        position = cache.length
        if self._choice is None or self._choice.sampler is not sampler:
            self.forget()
            self._choice = device_choice(sampler, position + 1)
        if self._choice is None:
            self.forget()
            return None
        # A shorter round comes before the end of the output; one plain step may be one among rounds with drafts.
        goes_on = k == self._last_k or (k > 0 and self._last_k is None)
        self._last_k = k
        return self._rounds.run(_Ask(self, cache, self._choice, newest, position, k, hidden, goes_on))


@dataclass(slots=True)
class _Launched:
    """A launch that is under way."""

    k: int
    kind: Kind
    lanes: list[tuple[Lane, int, DeviceChoice]]
    """Its sequences, the way that each was on, and its choices."""
    outputs: tuple[Tensor, ...]
    """Of the recorded round: results, the next states and hidden rows, hidden rows. The next launch overwrites them."""
    host: Tensor
    """Where the results arrive."""
    hidden: Tensor = field(init=False)
    _arrived: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.hidden = self.outputs[3].clone()
        self.host = self.host[: self.outputs[0].numel()]
        self.host.copy_(self.outputs[0].view(-1), non_blocking=True)
        if self.hidden.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def is_done(self) -> bool:
        """Whether the results have arrived."""
        return self._arrived is None or bool(self._arrived.query())

    def wait(self) -> list[tuple[list[int], list[int], list[float], list[int]]]:
        """Drafts, choices, the drafts' largest logits, and the times of a round that is timed, of each sequence."""
        if self._arrived is not None:
            self._arrived.synchronize()
        k, width = self.k, 3 * self.k + 1 + _TIMES * self.kind.timed
        values = self.host.tolist()
        rows = [values[index * width : (index + 1) * width] for index in range(len(self.lanes))]
        return [
            (
                row[:k],
                row[k : 2 * k + 1],
                list(struct.unpack(f"{k}d", struct.pack(f"{k}q", *row[2 * k + 1 : 3 * k + 1]))),
                row[3 * k + 1 :],
            )
            for row in rows
        ]


class DeviceRounds:
    """The rounds of a target's sequences.

    Whoever asks while nobody leads leads: it launches for all that ask, waits for the results, and hands them out.

    Args:
        target: The target; it captures its steps.
        drafting: Drafts; None: rounds without drafts, plain steps, alone.
        lock: Held while a model runs.
    """

    def __init__(self, target: Decoder, drafting: Drafting | None, lock: threading.Lock) -> None:
        self._target = target
        self._drafting = drafting
        self._lock = lock
        # In fixed steps a row's bits depend on how many rows a product has: each sequence then runs alone.
        lanes = 1 if target.fixed else max(1, min(MOST_LANES, MOST_ROWS // target.step_rows))
        self.most_lanes = 1 << (lanes.bit_length() - 1)
        """A power of two: there is one recorded round for each."""
        size = self.most_lanes * (3 * target.step_rows + 1 + _TIMES)
        pinned = target.device.type == "cuda"
        self._host = [torch.empty(size, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._recorded: dict[tuple[int, int, Kind], tuple[SharedCaches, Captured]] = {}
        self._asked: Counter[int] = Counter()
        # Guards what follows. Whoever holds it may take the lock, never the other way round.
        self._turn = threading.Condition()
        self._led = False
        self._asks: list[_Ask] = []
        self._ahead: _Launched | None = None
        self._last: list[tuple[Lane, int, DeviceChoice]] = []

    def run(self, ask: _Ask) -> Ran:
        """Wait for a round, unless it has run."""
        lane, start = ask.lane, (ask.position, ask.newest)
        with self._turn:
            found, lane.found = lane.found, None
            if found is not None:
                way, ran = found
                if way == lane.way and (ran.position, ran.newest) == start and len(ran.drafts) >= ask.k:
                    return ran
            if found is not None or lane.expected != start:
                lane.way += 1
            lane.expected = start
            self._asks.append(ask)
            self._turn.notify_all()
            try:
                while ask.ran is None:
                    if self._led:
                        self._turn.wait()
                        continue
                    self._led = True
                    try:
                        self._lead()
                    finally:
                        self._led = False
                        self._turn.notify_all()
            finally:
                self._asks.remove(ask)
            return ask.ran

    def _lead(self) -> None:
        """See to it that one launch ends, and that the next one is under way before, if it can be."""
        launched, self._ahead = self._ahead, None
        if launched is None:
            patience = time.monotonic() + _PATIENCE
            while self._missing(self._last) and (left := patience - time.monotonic()) > 0:
                self._turn.wait(left)
            launched = self._first()
        else:
            # The GPU works on it: its sequences have until then to ask for it.
            while self._missing(launched.lanes) and not launched.is_done():
                self._turn.wait(_LOOK)
        self._ahead = self._next(launched)
        self._turn.release()
        try:
            results = launched.wait()
        finally:
            self._turn.acquire()
        for index, (lane, way, choice) in enumerate(launched.lanes):
            if lane.way == way:
                self._hand_out(lane, choice, *results[index], launched.hidden[index])
        self._last = launched.lanes

    def _hand_out(
        self,
        lane: Lane,
        choice: DeviceChoice,
        drafts: list[int],
        chosen: list[int],
        largest: list[float],
        times: list[int],
        hidden: Tensor,
    ) -> None:
        if times and lane.seconds is not None:
            lane.seconds = [
                so_far + (end - start) / 1e9 for so_far, start, end in zip(lane.seconds, times, times[1:], strict=False)
            ]
        position, newest = lane.expected
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == chosen[accepted]:
            accepted += 1
        ran = Ran(choice, position, newest, drafts, largest, chosen, hidden)
        lane.expected = position + accepted + 1, chosen[accepted]
        ask = self._ask_of(lane)
        if ask is not None:
            ask.ran = ran
        else:
            lane.found = lane.way, ran
        if chosen[accepted] == _UNSOUND:
            # The rows of what runs ahead may hold NaN, which masked slots would pass on.
            lane.forget()
            with self._lock, torch.inference_mode():
                # One that is closed is cleared before it is used again; a new owner runs nothing without the lock.
                if lane.cache is not None:
                    lane.cache.zero(position, 2 * self._target.step_rows)

    def _ask_of(self, lane: Lane) -> _Ask | None:
        return next((ask for ask in self._waiting() if ask.lane is lane), None)

    def _waiting(self) -> list[_Ask]:
        """Who waits for a round; others have not yet seen that they have theirs."""
        return [ask for ask in self._asks if ask.ran is None]

    def _missing(self, lanes: list[tuple[Lane, int, DeviceChoice]]) -> bool:
        """Whether one of these sequences may still ask for what follows."""
        return any(lane.way == way and self._ask_of(lane) is None for lane, way, _ in lanes)

    def _first(self) -> _Launched:
        """Launch a round of those that ask, from what the host knows."""
        waiting = self._waiting()
        kind = waiting[0].kind
        asks = [ask for ask in waiting if ask.kind == kind][: self.most_lanes]
        return self._launch(asks, kind, *self._given(asks))

    def _next(self, launched: _Launched) -> _Launched | None:
        """Launch the round after one that is under way, for those that go on, and for those that join; if any goes on.

        Those who wait for choices of another kind come next otherwise.
        """
        going: list[tuple[int, _Ask]] = []
        answered: set[Lane] = set()
        for index, (lane, way, _) in enumerate(launched.lanes):
            ask = self._ask_of(lane)
            if lane.way != way or ask is None:
                continue
            if launched.k >= ask.k and (ask.k or not launched.k or self._target.fixed or len(launched.lanes) > 1):
                answered.add(lane)
                if ask.goes_on:
                    going.append((index, ask))
            else:
                lane.way += 1  # it waits for another round than this one
        others = [ask for ask in self._waiting() if ask.lane not in answered]
        if not going or any(ask.kind != launched.kind for ask in others):
            return None
        joining = others[: self.most_lanes - len(going)]
        places = [index for index, _ in going]
        _, states, rows, _ = launched.outputs
        if joining or places != list(range(len(states))):
            states, rows = states[places], rows[places]
        if joining:
            given = self._given(joining)
            states, rows = torch.cat([states, given[0]]), torch.cat([rows, given[1]])
        return self._launch([*(ask for _, ask in going), *joining], launched.kind, states, rows)

    def _given(self, asks: list[_Ask]) -> tuple[Tensor, Tensor]:
        """States and hidden rows from the host."""
        states = torch.tensor(
            [state_of(ask.choice, ask.newest, ask.position) for ask in asks], device=self._target.device
        )
        return states, torch.cat([ask.hidden for ask in asks])

    def _launch(self, asks: list[_Ask], kind: Kind, state: Tensor, hidden: Tensor) -> _Launched:
        k = self._k_to_run(max(ask.k for ask in asks), kind, alone=len(asks) == 1)
        caches, rows = [ask.cache for ask in asks], self._target.step_rows
        missing = (1 << (len(asks) - 1).bit_length()) - len(asks)
        if missing:  # the first sequence's rows again, which write the same once more
            caches += [caches[0]] * missing
            state = torch.cat([state, state[:1].expand(missing, -1)])
            hidden = torch.cat([hidden, hidden[:1].expand(missing, -1)])
        with self._lock:
            for ask in asks:
                # This round may start after the one that is under way, which may accept all.
                ask.cache.wrote(ask.position + 2 * rows)
                ask.cache.reserve(ask.position + 3 * rows + 1)
            key = (len(caches), k, kind)
            if key not in self._recorded:
                shared = SharedCaches(caches)

                def recorded(state: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
                    return self._round(state, hidden, k, kind, shared)

                _, neighbour = next(iter(self._recorded.values()), (None, None))
                self._recorded[key] = shared, Captured(recorded, (state, hidden), neighbour)
            shared, captured = self._recorded[key]
            shared.point_at(caches)
            outputs = captured(state, hidden)
            self._host.reverse()
            return _Launched(k, kind, [(ask.lane, ask.lane.way, ask.choice) for ask in asks], outputs, self._host[0])

    def _k_to_run(self, k: int, kind: Kind, *, alone: bool) -> int:
        """``k``, or more drafts where rounds of so many are recorded, and ones of k are rare."""
        recorded = {own_k for _, own_k, own_kind in self._recorded if own_kind == kind}
        # A plain step alone is one of a single row, unless steps are fixed: that is faster.
        serving = [other for other in recorded if other >= k and (k or self._target.fixed or not (alone and other))]
        if k in recorded or not serving or self._asked[k] >= _OWN_ROUND - 1:
            return k
        self._asked[k] += 1
        return min(serving)

    def _round(self, state: Tensor, hidden: Tensor, k: int, kind: Kind, cache: SharedCaches) -> tuple[Tensor, ...]:
        """A round in operations that can be recorded.

        Returns:
            Of each sequence the result, int64: drafts, choices, the bits (float64) of the drafts' largest logits, and
            when the parts of a timed round end;
            the next round's state and hidden row; and the hidden rows of the newest token and the drafts.
        """
        target, count = self._target, len(state)
        drafts, largest = state[:, :0], hidden.new_empty((count, 0), dtype=torch.float32)
        times = torch.empty(_TIMES * kind.timed, device=state.device, dtype=torch.int64)

        def ended(part: int) -> None:
            if kind.timed:
                stamp(times, part)

        ended(0)
        if k:
            assert self._drafting is not None
            drafts, largest = self._drafting.draft(state, hidden, k, kind, cache)
        ended(1)
        rows = target.step_rows if target.fixed or k else 1
        token_ids, positions, slots, row_of_token = rows_of_step(state, drafts, rows, fixed=target.fixed)
        positions = positions.flatten()
        cache.begin_step(positions, slots.flatten())
        found = target.network.run(target.run_ids(token_ids.flatten()), cache)
        logits = target.logits(found)
        ended(2)
        keys = noise_keys(state, positions)
        chosen, most = choose(logits, keys, state, kind)
        row_of_token = row_of_token[:, : k + 1]
        chosen = torch.where(most.isfinite(), chosen, _UNSOUND).view(count, rows).gather(1, row_of_token)
        if kind.chance is not None:
            own_keys = keys[:, 0].view(count, rows).gather(1, row_of_token)
            chosen = accepted_by_chance(chosen, drafts, own_keys, kind.chance, target.lm_head.weight.shape[0])
        lane = torch.arange(count, device=state.device)
        found = found.view(count, rows, -1)[lane[:, None], row_of_token]
        accepted = (drafts == chosen[:, :k]).long().cumprod(1).sum(1, keepdim=True)
        # What follows a row that is not sound is not used: token 0 stands for it.
        following = torch.cat([chosen.gather(1, accepted).clamp(min=0), state[:, 1:2] + accepted + 1, state[:, 2:]], 1)
        ended(3)
        result = torch.cat([drafts, chosen, largest.double().view(torch.int64), times.expand(count, -1)], 1)
        return result, following, found[lane, accepted[:, 0]], found


def rows_of_step(state: Tensor, drafts: Tensor, rows: int, *, fixed: bool) -> Tensor:
    """The rows of the step that verifies drafts, as ``TransformersSequence.run_step`` lays them out.

    Args:
        state: Of the round, (sequences, ``STATE``).
        drafts: Int64, shape (sequences, k).
        rows: Of each sequence in the step, at least k + 1.
        fixed: Whether a position decides its row.

    Returns:
        Int64, shape (4, sequences, rows): tokens, positions, slots, and the row of each token among its sequence's.
    """
    position = state[:, 1:2]
    index = torch.arange(rows, device=state.device).expand(len(state), -1)
    order, row_of_token = (index - position) % rows, (index + position) % rows
    if not fixed:
        order = row_of_token = index
    own = order.clamp(max=drafts.shape[1])  # padding rows run copies of the last token
    tokens = torch.cat([state[:, :1], drafts], 1).gather(1, own)
    return torch.stack([tokens, position + own, position + order, row_of_token])
