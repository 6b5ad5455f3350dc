"""The sides of a comparison take turns, in alternating order, on the same prompts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from polydraft._measuring.bench import AnyK, CallSettings, Group, NotMeasurable, Sample, Way
from polydraft._measuring.calls import undisturbed
from polydraft.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polydraft._measuring.bench import Bench, LoadedInfo
    from polydraft._measuring.prompts import MeasuredPrompt

__all__ = ["Side", "Turns"]

_progress = logging.getLogger("polydraft.progress")
_SWEEP = 8
"""The largest k of a sweep, unless the recommended one is more than half of it."""
_LONGEST = 3600.0
"""Seconds of a call."""


@dataclass(slots=True, eq=False)
class Side:
    """What takes part: polydraft or the engine's own loop, with one k."""

    group: Group
    k: AnyK
    upstream: str = ""
    """Name of the engine's own loop; empty: polydraft's."""
    state: Literal["measured", "refused", "failed", "slow"] = "measured"
    reason: str = ""
    samples: dict[tuple[int, int], Sample] = field(default_factory=dict)
    """(index of the prompt, repeat from 1) -> call."""
    split: list[Sample] = field(default_factory=list)
    """Calls whose rounds were split: their speed does not count."""

    @property
    def label(self) -> str:
        """As its row will be called."""
        how = f"{self.group.way.method} k={self.k}" if self.k else "plain"
        return f"{self.group.backend}{' upstream' if self.upstream else ''} {how}"


class Turns:
    """One benchmark in progress; ``sides`` hold what it has found, whenever it is ended.

    Args:
        bench: Measures.
        prompts: At least one.
        settings: How calls are made.
        repeats: How often each prompt counts, after one round that does not.
        progress: Called with a sentence whenever something has been done.
    """

    def __init__(
        self,
        bench: Bench,
        prompts: Sequence[MeasuredPrompt],
        settings: CallSettings,
        repeats: int,
        progress: Callable[[str], None],
    ) -> None:
        self.bench = bench
        self.sides: list[Side] = []
        self.seconds = 0.0
        """Of calls."""
        self.alternated = True
        """Whether all engines were loaded at once, so that all sides took turns."""
        self.repeats = 0
        """That all sides have made, as far as they could."""
        self.prompts = prompts
        self._settings = settings
        self._repeats = repeats
        self._say = progress

    def clock(self, side: Side) -> Callable[[Sample], float]:
        """How long a call of a side took: all by the same clock.

        Where each side computes in its process, on the processor, the time in which other programs had it does not
        count. Where one does not, nobody knows how long others had it then: the clock on the wall counts for all.
        """
        if all(one.cpu_seconds is not None for other in self.sides for one in other.samples.values()):
            return undisturbed(side.samples.values())
        return lambda sample: sample.seconds

    def runs_whole(self, side: Side) -> bool:
        """Whether its rounds cannot be split: its engine runs them in one piece, or keeps its own loop."""
        parts = [call.parts for call in side.split]
        return not self.bench.info(side.group).steps or any(one is None or one.verify is None for one in parts)

    def _speed(self, side: Side, repeat: int) -> float | None:
        """Tokens/s of a repeat."""
        calls = [one for (_, number), one in side.samples.items() if number == repeat]
        seconds = sum(map(self.clock(side), calls))
        return sum(one.num_tokens for one in calls) / seconds if seconds else None

    def add(self, backend: str, ks: Sequence[AnyK] | Literal["sweep"] | None, *, upstream: bool) -> None:
        """Load a backend, and add its sides: plain decoding, and speculation with each k.

        Args:
            backend: The name.
            ks: None: the recommended k. ``sweep``: from 1 to 8, or to twice the recommended one.
            upstream: Whether the engine's own loop takes part, too.

        Raises:
            UnsupportedError: The engine has no such loop, or one in which acceptance cannot be set as asked.
        """
        try:
            ways = self.bench.ways(backend)
        except NotMeasurable as error:
            self.sides.append(Side(Group(backend, Way(), 0), 0, state=error.state, reason=error.reason))
            return
        way = ways[1] if len(ways) > 1 else None  # that of the drafter that was asked for comes first
        if way is None:
            if self._loaded(Group(backend, Way(), 0), [0]):
                self.sides.append(Side(Group(backend, Way(), 0), 0))
            return
        if ks is None:
            ks = [way.recommended]
        elif ks == "sweep":
            most = min(way.most, max(_SWEEP, 2 * way.recommended))
            ks = [way.recommended] if way.one_k else list(range(1, most + 1))
        fitting = [k for k in ks if k == "auto" or k <= way.most]
        own = way.upstream if upstream else ""
        if upstream and not own:
            raise UnsupportedError(
                f"The backend {backend} has no loop of its engine's own for {way.method} drafts to compare with: the "
                "engine has none, or it is what polydraft runs.",
                "Leave out `against='upstream'`, or compare several backends.",
            )
        if not (way.any_k and fitting and self._add_shared(backend, way, fitting, own)):
            self._add_one_by_one(backend, way, fitting, own)
        for k in ks:
            if k != "auto" and k not in fitting:
                self._loaded(Group(backend, way, k), [k])  # refused, with the reason

    def _add_shared(self, backend: str, way: Way, ks: Sequence[AnyK], own: str) -> bool:
        """All sides on one engine; False if it has one k for all calls."""
        # Each step has room for the largest k; "auto" picks up to twice the usual one.
        most = [min(way.most, 2 * way.recommended) if k == "auto" else k for k in ks]
        group = Group(backend, way, max(most))
        info = self._loaded(group, ks)
        if info is None:
            if self._loaded(Group(backend, Way(), 0), [0]):  # the drafter may be what failed
                self.sides.append(Side(Group(backend, Way(), 0), 0))
            return True
        if not info.any_k:
            self.bench.unload(group)
            return False
        self._add_sides(group, [0, *ks], own)
        return True

    def _add_one_by_one(self, backend: str, way: Way, ks: Sequence[AnyK], own: str) -> None:
        """Each side on an engine of its own."""
        if self._loaded(Group(backend, Way(), 0), [0]):
            self._add_sides(Group(backend, Way(), 0), [0], "")
        for k in ks:
            group = Group(backend, way, 0, picks_k=True) if k == "auto" else Group(backend, way, k)
            if self._loaded(group, [k]):
                self._add_sides(group, [k], own)

    def _add_sides(self, group: Group, ks: Sequence[AnyK], own: str) -> None:
        self.sides += [Side(group, k) for k in ks]
        if own:
            has_plain = any(side.upstream and side.k == 0 for side in self.sides if side.group.backend == group.backend)
            numbers = [k for k in ks if k not in {"auto", 0}]
            self.sides += [Side(group, k, own) for k in ([] if has_plain else [0]) + numbers]

    def _loaded(self, group: Group, ks: Sequence[AnyK]) -> LoadedInfo | None:
        """What was loaded; None if it could not be: then there is a row with the reason for each of ``ks``."""
        k = "auto" if group.picks_k else group.k
        self._say(f"Loading {group.backend} {f'{group.way.method} k={k}' if k else 'plain'}")
        try:
            info = self.bench.load(group)
        except NotMeasurable as error:
            self.sides += [Side(group, k, state=error.state, reason=error.reason) for k in ks]
            return None
        if self._settings.synthetic_acceptance is not None and not info.steps:
            raise UnsupportedError(
                f"The engine of the backend {group.backend} keeps its own loop, in which acceptance cannot be set.",
                "Leave out `synthetic_acceptance`, or name another backend (`polydraft backends` lists them).",
            )
        return info

    def run(self, after_repeat: Callable[[], None] = lambda: None) -> None:
        """Measure all that could be loaded."""
        left = [side for side in self.sides if side.state == "measured"]
        groups = list(dict.fromkeys(side.group for side in left))
        self.alternated = self.bench.together(groups)
        for batch in [left] if self.alternated else [[one for one in left if one.group == group] for group in groups]:
            self._take_turns(batch, after_repeat)

    def _take_turns(self, sides: list[Side], after_repeat: Callable[[], None]) -> None:
        self.repeats = 0
        for repeat in range(self._repeats + 1):
            if all(side.state != "measured" for side in sides):
                return
            started = time.monotonic()
            # Each repeat starts elsewhere, and every second one goes backwards.
            turn = repeat % len(sides)
            order = sides[turn:] + sides[:turn]
            if repeat % 2:
                order.reverse()
            what = f"Repeat {repeat} of {self._repeats}" if repeat else "Warming up"
            self._all_prompts(order, what, repeat)
            seconds = time.monotonic() - started
            if repeat:
                speeds = ((side.label, self._speed(side, repeat)) for side in sides)
                self._say(f"{what}, tokens/s: {', '.join(f'{name} {speed:.1f}' for name, speed in speeds if speed)}")
                self.repeats = repeat
                after_repeat()
            elif any(side.state == "measured" for side in sides):
                times = "1 repeat" if self._repeats == 1 else f"{self._repeats} repeats"
                self._say(f"Warmed up; {times} of about {seconds:.0f} s to come")
        self._all_prompts([side for side in sides if not side.upstream], "Splitting rounds", None)

    def _all_prompts(self, sides: Sequence[Side], what: str, repeat: int | None) -> None:
        """One call of each side for each prompt; None: to split their rounds."""
        for at in range(len(self.prompts)):
            for side in sides:
                splits = repeat is None and not side.reason and self.bench.info(side.group).steps
                if side.state == "measured" and (repeat is not None or splits):
                    _progress.info("%s, prompt %d of %d: %s", what, at + 1, len(self.prompts), side.label)
                    self._call(side, at, repeat)

    def _call(self, side: Side, prompt: int, repeat: int | None) -> None:
        settings = self._settings.model_copy(update={"upstream": bool(side.upstream), "split": repeat is None})
        if settings.temperature:
            settings = settings.model_copy(update={"seed": repeat or 0})
        started = time.monotonic()
        try:
            sample = self.bench.measure(side.group, side.k, self.prompts[prompt], settings, _LONGEST)
        except NotMeasurable as error:
            self._say(f"{side.label}: {error.state}: {error.reason}")
            if repeat is not None:
                side.state, side.reason = error.state, error.reason
            else:  # it has been measured
                side.reason = f"Its rounds cannot be split: {error.reason}"
                side.split.clear()
            return
        finally:
            self.seconds += time.monotonic() - started
        if sample.cut:
            side.state, side.reason = "slow", f"A call took longer than {_LONGEST:.0f} s."
        elif repeat is None:
            side.split.append(sample)
        elif repeat and sample.num_tokens:
            side.samples[prompt, repeat] = sample
