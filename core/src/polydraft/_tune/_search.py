"""What is measured when, within the time: a survey of all candidates, then rounds of those that may be the fastest.

A *candidate* is a backend with a drafter and a k. A *round* is one call for each prompt of a batch with each candidate
that is left, in alternating order, so that what slows the machine down for a while hits all of them. Two candidates are
compared on the calls that both made: each prompt counts with the lower quartile over the rounds, as other programs only
make calls slower. One is dropped once it was slower by more than what few rounds may err by. Around the best k of a
drafter, the ks between those measured join.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median

from polydraft._measuring.bench import Bench, CallSettings, Group, LoadedInfo, NotMeasurable, Sample, Way
from polydraft._measuring.calls import seconds_per_token, undisturbed, usual
from polydraft._measuring.prompts import MeasuredPrompt
from polydraft._tune._records import RowState
from polydraft.verification._verdict import Verdict

__all__ = ["LONGEST_CHECK", "WITHIN", "Candidate", "Limits", "Search", "Skipped", "slowdown"]

_log = logging.getLogger("polydraft.tune")

WITHIN = 0.05
"""How far the choice may be from the fastest."""
_BATCH, _ROUNDS_OF_BATCH = 4, 3
"""Prompts of a round, and rounds before the next prompts."""
_SHARE_OF_SURVEY, _SHARE_OF_VERDICTS = 0.25, 0.15
_VERDICTS = 4
"""For so many of the fastest a kept verdict is looked for."""
LONGEST_CHECK = 20.0
"""Seconds for the verdict on one candidate."""
_SLOWER = (1.4, 1.2, 1.1)
"""After so many rounds together, how many times as long as the best a candidate may take; later 1 + ``_LATER``."""
_LATER = 1.06
_MOST_LEFT = (10, 7, 5, 4, 3)
"""How many candidates are left after so many rounds; the time is for those."""
_PROVEN = 3
"""Rounds that the fastest must have, where there were so many."""
_WORTH = 1.2
"""Other ks of a drafter are tried if its best takes at most this many times as long as the best of all."""
_ROUNDS_OF_JOINING = 2
_LOADS = 4
"""How many ks are tried of a drafter that has to be loaded again for each."""
_ROUNDS_OF_VISIT, _MOST_VISITS = 3, 3
"""Where not all engines fit into memory at once: rounds of one before the next, and how often that is done."""
_ENOUGH_ROUNDS, _ENOUGH = 6, 0.98
"""With so many rounds, this confidence ends the search early."""
_NEAR = 1.15
"""One that took so many times as long in fewer rounds than ``_PROVEN`` casts no doubt."""
_RESAMPLINGS = 200
_MOST_TOKENS, _FEWEST_TOKENS, _FIRST_TOKENS = 64, 32, 16
_CALLS = 60
"""So many calls must fit into the time: else outputs are shorter."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much to measure."""

    seconds: float
    """For all calls together; the starts of engines are not counted."""
    max_new_tokens: int | None = None
    """None: 64, or fewer where the machine is slow."""
    k: int | None = None
    """The only k besides plain decoding; None: those that may be best are tried."""


@dataclass(slots=True, eq=False)
class Candidate:
    """A group with one k, and what was measured of it."""

    group: Group
    k: int
    info: LoadedInfo
    samples: dict[tuple[int, int], Sample] = field(default_factory=dict)
    """(index of the prompt, round) -> call."""
    state: RowState = "measured"
    reason: str = ""
    verdict: Verdict | None = None
    _of: int = -1
    """Number of samples that ``_undisturbed`` was made of."""
    _undisturbed: Callable[[Sample], float] = field(default=lambda sample: sample.seconds)

    @property
    def rounds(self) -> set[int]:
        """The rounds that it took part in."""
        return {number for _, number in self.samples}

    @property
    def seconds_per_token(self) -> float:
        """Over all of its calls; infinite before the first."""
        return seconds_per_token(self.samples, usual, self.undisturbed) if self.samples else inf

    @property
    def undisturbed(self) -> Callable[[Sample], float]:
        """How long one of its calls took, without what other programs took."""
        if self._of != len(self.samples):
            self._of = len(self.samples)
            self._undisturbed = undisturbed(self.samples.values())
        return self._undisturbed


@dataclass(frozen=True, slots=True)
class Skipped:
    """What could not be measured at all."""

    backend: str
    way: Way
    k: int
    state: RowState
    reason: str


def slowdown(one: Candidate, other: Candidate, rounds: Sequence[int] | None = None) -> float:
    """How many times as long ``one`` takes for a token, on the calls that both made; of ``rounds``, as often as given.

    Without a call in common, of all that each has made.
    """
    common = [key for key in one.samples if key in other.samples]
    if rounds is None:
        if not common:
            return one.seconds_per_token / other.seconds_per_token
        drawn = list(enumerate(common))
    else:
        # A round that was drawn several times counts as often.
        drawn = [(at, key) for at, number in enumerate(rounds) for key in common if key[1] == number]
    first, second = (
        seconds_per_token({(key[0], at): candidate.samples[key] for at, key in drawn}, usual, candidate.undisturbed)
        for candidate in (one, other)
    )
    return first / second


def typical_slowdown(one: Candidate, other: Candidate) -> float:
    """The same of a typical call: a disturbed one does not show in it, nor does a prompt of another kind."""
    first, second = one.undisturbed, other.undisturbed
    return median(
        (first(sample) / max(sample.num_tokens, 1))
        / (second(other.samples[key]) / max(other.samples[key].num_tokens, 1))
        for key, sample in one.samples.items()
        if key in other.samples
    )


class Search:
    """One tuning in progress. ``candidates`` and ``skipped`` are what it has found, whenever it is ended.

    Args:
        bench: Measures.
        prompts: At least one.
        limits: The time.
        clock: Seconds, such as ``time.monotonic``.
        progress: Called with a sentence whenever something new is done.
    """

    def __init__(
        self,
        bench: Bench,
        prompts: Sequence[MeasuredPrompt],
        limits: Limits,
        *,
        clock: Callable[[], float],
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.bench = bench
        self.prompts = prompts
        self.limits = limits
        self.candidates: list[Candidate] = []
        self.skipped: list[Skipped] = []
        self.spent = 0.0
        """Seconds of calls."""
        self.max_new_tokens = limits.max_new_tokens or 0
        self._deadline = limits.seconds * (1 - _SHARE_OF_VERDICTS)
        self._clock = clock
        self._progress = progress
        # Prompts of one batch are neighbours: the built-in set has one of each class there.
        self._batches = [list(range(at, min(at + _BATCH, len(prompts)))) for at in range(0, len(prompts), _BATCH)]
        self._round = self._visits = 0

    # The parts of the search -----------------------------------------------------------------------------------------

    def run(self, backends: Sequence[str]) -> None:
        """Measure until the time is spent, or one candidate is surely the fastest; then ask for its verdict."""
        self._survey(self._groups(backends))
        while self.leaders and self._visits < _MOST_VISITS and self.spent + self._cost_of_round() <= self._deadline:
            self._round += 1
            if self._round <= _ROUNDS_OF_JOINING:
                self._refine()
            self._measure_round()
            self._drop_slower()
            enough = len({*self.leaders[0].rounds}) >= _ENOUGH_ROUNDS if self.leaders else True
            if enough and (self.confidence() or 0) >= _ENOUGH:
                break
        self._ask_for_verdicts()

    @property
    def leaders(self) -> list[Candidate]:
        """The candidates that are left, the fastest first."""
        left = [one for one in self.candidates if one.state == "measured" and one.samples]
        if not left:
            return []
        # Compared with the one that was measured most: it has calls in common with every other. One that has joined
        # late comes behind those that have proven themselves.
        reference = max(left, key=lambda one: (len(one.samples), -one.seconds_per_token))
        enough = min(_PROVEN, len(reference.rounds) - 1)
        # Nobody is given quantized weights unasked where others run.
        ranked = sorted(left, key=lambda one: (one.info.quantized, len(one.rounds) < enough, slowdown(one, reference)))
        best = ranked[0]
        for one in ranked[1:]:  # face to face: their calls in common with the reference were not the same
            if one.info.quantized == best.info.quantized and len(one.rounds) >= enough and slowdown(one, best) < 1:
                best = one
        return [best, *(one for one in ranked if one is not best)]

    def confidence(self) -> float | None:
        """The share of resamplings of the rounds in which the first leader is within 5% of the fastest."""
        leaders = self.leaders
        if not leaders:
            return None
        best, *others = leaders
        shared = {one: sorted(one.rounds & best.rounds) for one in others}
        near = [one for one in others if len(shared[one]) >= _PROVEN or slowdown(one, best) < _NEAR]
        if min([len(best.rounds), *(len(shared[one]) for one in near)]) < _PROVEN:
            return None
        chance = random.Random(0)
        kept = 0
        for _ in range(_RESAMPLINGS):
            drawn = (chance.choices(shared[one], k=len(shared[one])) for one in near)
            kept += all(slowdown(best, one, rounds) <= 1 + WITHIN for one, rounds in zip(near, drawn, strict=True))
        return kept / _RESAMPLINGS

    def _groups(self, backends: Sequence[str]) -> list[Group]:
        found = []
        for name in backends:
            self._progress(f"Looking at {name}")
            try:
                ways = self.bench.ways(name)
            except NotMeasurable as error:
                self._skip(name, Way(), 0, error)
                continue
            for way in ways:
                if way.method is None and len(ways) > 1:
                    continue  # an engine that takes any k decodes plainly as well; else it is added below
                found.append(Group(name, way, self._loaded_k(way)))
        return found

    def _loaded_k(self, way: Way) -> int:
        if way.method is None:
            return 0
        if self.limits.k is not None:
            return self.limits.k  # too large a one is refused, by the backend's name
        # Engines that take any k up to that of the load are loaded once for all that may be tried.
        return min(way.most, 3 * way.recommended) if way.any_k else way.recommended

    def _survey(self, groups: list[Group]) -> None:
        """Each group once, with few ks."""
        waiting = list(groups)
        plain = {group.backend for group in groups if group.way.method is None}
        while waiting:
            group = waiting.pop(0)
            room = max(0.0, self.limits.seconds * _SHARE_OF_SURVEY - self.spent) / (len(waiting) + 1)
            info = self._load(group)
            ks = self._first_ks(group) if info and info.any_k and group.k else [group.k]
            if group.backend not in plain:
                plain.add(group.backend)
                if info and info.any_k:
                    ks = [0, *ks]
                else:  # a load of its own; where the drafter could not be loaded, it may be what works
                    waiting.insert(0, Group(group.backend, Way(), 0))
            if info:
                self._first_calls(group, info, ks, room)

    def _first_ks(self, group: Group) -> list[int]:
        usual = group.way.recommended
        if self.limits.k is not None:
            return [group.k]
        return list(dict.fromkeys([usual, max(1, usual // 2), min(2 * usual, group.k)]))

    def _first_calls(self, group: Group, info: LoadedInfo, ks: Sequence[int], room: float) -> None:
        if not self.max_new_tokens:
            self.max_new_tokens = self._fitting_tokens(group, ks[0])
        until = self.spent + room
        for at, k in enumerate(ks):
            if any(ks[:at]) and self.spent >= until:  # one with speculation, whatever it takes
                _log.info("No time for k=%d of %s", k, group)
                break
            self._progress(f"Measuring {_label(group, k)}")
            candidate = Candidate(group, k, info)
            self.candidates.append(candidate)
            for prompt in self._batches[0]:
                # A slow engine overruns its share, a little: an output that was cut says less.
                limit = max(until - self.spent, self.limits.seconds / 40)
                if not self._call(candidate, prompt, limit, 0):
                    break

    def _fitting_tokens(self, group: Group, k: int) -> int:
        """Tokens for each output: fewer than usual only where a call would take too much of the time."""
        longest = self.limits.seconds / _CALLS
        started = self._clock()
        try:
            few = self.bench.measure(group, k, self.prompts[0], CallSettings(max_new_tokens=_FIRST_TOKENS), longest)
        except NotMeasurable:
            return _MOST_TOKENS  # the next call says why
        finally:
            self.spent += self._clock() - started
        a_token = few.seconds / max(1, few.num_tokens)
        return max(_FEWEST_TOKENS, min(_MOST_TOKENS, int(longest / max(a_token, 1e-9))))

    def _refine(self) -> None:
        """Add the ks next to the best one of each drafter, where that may be the fastest of all."""
        leaders = self.leaders
        if self.limits.k is not None or not leaders:
            return
        best: dict[tuple[str, Way], Candidate] = {}
        for one in leaders:
            if one.k:
                best.setdefault((one.group.backend, one.group.way), one)
        for (backend, way), top in best.items():
            if way.one_k or slowdown(top, leaders[0]) > _WORTH:
                continue
            tried = sorted({one.k for one in self.candidates if (one.group.backend, one.group.way) == (backend, way)})
            refused = {one.k for one in self.skipped if (one.backend, one.way) == (backend, way)}
            if not top.info.any_k and len(tried) >= _LOADS:
                continue
            most = top.group.k if top.info.any_k else way.most
            below = max((k for k in tried if k < top.k), default=0)
            above = min((k for k in tried if k > top.k), default=None)
            larger = min(most, 2 * top.k) if above is None else (top.k + above) // 2
            for k in {(below + top.k) // 2, larger} - {*tried, *refused, 0}:
                if abs(k - top.k) >= max(1, top.k // 4):  # one that is nearer can hardly differ
                    self._join(top, k)

    def _join(self, like: Candidate, k: int) -> None:
        if like.info.any_k:
            self.candidates.append(Candidate(like.group, k, like.info))
            return
        group = Group(like.group.backend, like.group.way, k)
        if info := self._load(group):
            self.candidates.append(Candidate(group, k, info))

    def _measure_round(self) -> None:
        left = [one for one in self.candidates if one.state == "measured"]
        batch = self._batch
        self._progress(f"Round {self._round}: {len(left)} candidates")
        # Each round starts elsewhere, and every second one goes backwards.
        turn = self._round % len(left)
        order = left[turn:] + left[:turn]
        if self._round % 2:
            order.reverse()
        limit = self.limits.seconds / 4
        groups = list(dict.fromkeys(one.group for one in order))
        if self.bench.together(groups):
            calls = [(one, prompt, self._round) for prompt in batch for one in order]
        else:
            # Each engine is loaded again: several rounds of it at once, and few such visits.
            self._visits += 1
            numbers = range(self._round, self._round + _ROUNDS_OF_VISIT)
            calls = [
                (one, prompt, number)
                for group in groups
                for number in numbers
                for prompt in batch
                for one in order
                if one.group == group
            ]
            self._round = numbers[-1]
        for one, prompt, number in calls:
            if self.spent >= self._deadline:
                break
            if one.state == "measured":
                self._call(one, prompt, limit, number)

    def _drop_slower(self) -> None:
        if not self.leaders:
            return
        best, *others = self.leaders
        # By speed alone: those that joined late have not proven themselves, and are to.
        others.sort(key=lambda one: slowdown(one, best))
        most = _MOST_LEFT[min(self._round, len(_MOST_LEFT)) - 1]
        for rank, one in enumerate(others, 1):
            together = len(one.rounds & best.rounds)
            allowed = _SLOWER[together - 1] if 0 < together <= len(_SLOWER) else _LATER
            if not together:
                continue
            times = slowdown(one, best)
            if min(times, typical_slowdown(one, best)) > allowed:
                one.state = "dropped"
                one.reason = f"After {together} rounds it took {times:.2f} times as long as the fastest."
            elif one.k and rank >= most and together > 1 and times > 1:  # plain decoding is what others are held to
                one.state = "dropped"
                one.reason = f"After {together} rounds {rank} others were in front: the time went to them."
        used = {one.group for one in self.candidates if one.state == "measured"}
        for group in {one.group for one in self.candidates} - used:
            self.bench.unload(group)

    def _ask_for_verdicts(self) -> None:
        """Kept verdicts of what is left; the first one is checked, and if it fails, the next."""
        diverged: set[tuple[str, Way]] = set()
        self._ask_leaders(diverged)
        if not self.leaders:  # what was only slower is what remains
            for one in self.candidates:
                if one.state == "dropped" and (one.k == 0 or (one.group.backend, one.group.way) not in diverged):
                    one.state, one.reason = "measured", ""
            self._ask_leaders(diverged)

    def _ask_leaders(self, diverged: set[tuple[str, Way]]) -> None:
        checked = False
        for at, one in enumerate(self.leaders):
            if one.k == 0:
                checked = True  # nothing to verify
                continue
            if checked and at >= _VERDICTS:
                break
            drafter = (one.group.backend, one.group.way)
            left = self.limits.seconds - self.spent
            seconds = 0.0 if checked or drafter in diverged else min(LONGEST_CHECK, max(0.0, left))
            if seconds:
                self._progress(f"Verifying {_label(one.group, one.k)}")
            started = self._clock()
            try:
                one.verdict = self.bench.verdict(one.group, one.k, seconds)
            except NotMeasurable as error:
                one.state, one.reason = error.state, error.reason
                continue
            finally:
                self.spent += self._clock() - started
            if one.verdict == "DIVERGED" or (one.verdict is None and drafter in diverged):
                # The other ks of a drafter that was found wrong are not trusted either.
                diverged.add(drafter)
                one.state = "refused"
                one.reason = f"{'Speculation' if one.verdict else 'Another k of this drafter'} changed the output."
            else:
                checked = True

    @property
    def _batch(self) -> list[int]:
        """The prompts of this round: the same for some rounds, since one call of each says little."""
        return self._batches[self._round // _ROUNDS_OF_BATCH % len(self._batches)]

    # Single steps ----------------------------------------------------------------------------------------------------

    def _load(self, group: Group) -> LoadedInfo | None:
        self._progress(f"Loading {_label(group, group.k)}")
        try:
            return self.bench.load(group)
        except NotMeasurable as error:
            self._skip(group.backend, group.way, group.k, error)
            return None

    def _skip(self, backend: str, way: Way, k: int, error: NotMeasurable) -> None:
        _log.info("%s: %s", backend, error.reason)
        self.skipped.append(Skipped(backend, way, k, error.state, error.reason))

    def _call(self, candidate: Candidate, prompt: int, limit: float, number: int) -> bool:
        started = self._clock()
        try:
            settings = CallSettings(max_new_tokens=self.max_new_tokens)
            sample = self.bench.measure(candidate.group, candidate.k, self.prompts[prompt], settings, limit)
        except NotMeasurable as error:
            candidate.state, candidate.reason = error.state, error.reason
            return False
        finally:
            self.spent += self._clock() - started
        if sample.num_tokens:
            candidate.samples[prompt, number] = sample
        elif not candidate.samples:
            candidate.state, candidate.reason = "slow", f"No token came within {limit:.0f} s."
            return False
        return True

    def _cost_of_round(self) -> float:
        """Seconds that a round of all that are left may take."""
        return sum(one.seconds_per_token * self.max_new_tokens * len(self._batch) for one in self.leaders)


def _label(group: Group, k: int) -> str:
    return f"{group.backend} {group.way.method} k={k}" if k else f"{group.backend} plain"
