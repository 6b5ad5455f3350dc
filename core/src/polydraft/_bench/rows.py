"""From the calls of all sides to rows of figures."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from polydraft._bench.records import BenchRow, RoundTimes
from polydraft._measuring.arguments import classes
from polydraft._measuring.calls import seconds_per_token
from polydraft.contract.results import GenerationStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from polydraft._bench.turns import Side, Turns
    from polydraft._measuring.bench import Sample
    from polydraft._measuring.prompts import MeasuredPrompt

__all__ = ["rows_of"]

Calls = dict[tuple[int, int], "Sample"]


class _Measured:
    """The calls of one side.

    Args:
        side: The side, which was measured.
        seconds: How long a call took.
    """

    def __init__(self, side: Side, seconds: Callable[[Sample], float]) -> None:
        self.side = side
        self.calls: Calls = side.samples
        self.seconds = seconds
        # A repeat that was interrupted has other prompts than those before it.
        most = max(len(self.of(repeat)) for repeat in self.repeats)
        whole = {repeat for repeat in self.repeats if len(self.of(repeat)) == most}
        self.calls = {key: one for key, one in side.samples.items() if key[1] in whole}

    @property
    def repeats(self) -> list[int]:
        return sorted({repeat for _, repeat in self.calls})

    def of(self, repeat: int) -> Calls:
        return {key: one for key, one in self.calls.items() if key[1] == repeat}

    def rate(self, calls: Mapping[tuple[int, int], Sample]) -> float:
        """Tokens/s; of each prompt the median."""
        return 1 / seconds_per_token(calls, median, self.seconds)

    def each(self, figure: Callable[[list[Sample]], float | None]) -> list[float]:
        """A figure of each repeat, where it is known."""
        found = (figure(list(self.of(repeat).values())) for repeat in self.repeats)
        return [value for value in found if value is not None]

    def _share(self, one: Sample) -> float:
        """How much of a call's time counts: other programs had the rest, equally in all of its parts."""
        return self.seconds(one) / one.seconds if one.seconds > 0 else 1.0

    def decode_rate(self, calls: list[Sample]) -> float | None:
        seconds = sum((one.stats.decode_seconds or 0.0) * self._share(one) for one in calls)
        return sum(max(one.num_tokens - 1, 0) for one in calls) / seconds if seconds else None

    def first_token(self, calls: list[Sample]) -> float | None:
        found = [one.first_token_seconds * self._share(one) for one in calls if one.first_token_seconds is not None]
        return median(found) if found else None

    def round_ms(self, calls: list[Sample]) -> float | None:
        """Milliseconds of a round."""
        steps = sum(one.stats.num_target_steps or 0 for one in calls)
        seconds = sum((one.stats.decode_seconds or 0.0) * self._share(one) for one in calls)
        return 1e3 * seconds / steps if steps else None

    def times(self, other: _Measured) -> list[float]:
        """In each repeat, how many times as fast as the other side, on the prompts of both."""
        found = []
        for repeat in self.repeats:
            both = self.of(repeat).keys() & other.of(repeat).keys()
            if both:
                mine, its = ({key: side.calls[key] for key in both} for side in (self, other))
                found.append(self.rate(mine) / other.rate(its))
        return found


def rows_of(turns: Turns, *, compares_outputs: bool) -> tuple[BenchRow, ...]:
    """A row for each side, in their order.

    Args:
        turns: What was measured.
        compares_outputs: Whether equal prompts must give equal outputs.
    """
    sides, prompts = turns.sides, turns.prompts
    measured = [_Measured(side, turns.clock(side)) for side in sides if side.samples]
    found = {one.side: one for one in measured}

    def like(side: Side, *, k: Any, upstream: bool) -> _Measured | None:
        """The side of the same backend with another k, or another loop."""
        return next(
            (
                one
                for one in measured
                if one.side.group.backend == side.group.backend
                and one.side.k == k
                and bool(one.side.upstream) == upstream
                and one.side is not side
            ),
            None,
        )

    rows = []
    for side in sides:
        one = found.get(side)
        if one is None:
            state = "failed" if side.state == "measured" else side.state
            rows.append(BenchRow(**_what(side), state=state, reason=side.reason or "It was not measured."))
            continue
        own_plain = like(side, k=0, upstream=bool(side.upstream)) if side.k else None
        plain = like(side, k=0, upstream=False)
        theirs = None if side.upstream else like(side, k=side.k, upstream=True)
        times_plain = one.times(own_plain) if own_plain else []
        times_upstream = one.times(theirs) if theirs else []
        rates = [one.rate(one.of(repeat)) for repeat in one.repeats]
        firsts = one.each(one.first_token)
        stats = GenerationStats.total(call.stats for call in one.calls.values())
        info = turns.bench.info(side.group)
        rows.append(
            BenchRow(
                **_what(side),
                state=side.state,
                reason=side.reason,
                tokens_per_second=one.rate(one.calls),
                spread=_spread(rates),
                runs=tuple(rates),
                decode_tokens_per_second=_median(one.each(one.decode_rate)),
                times_plain=_median(times_plain),
                times_plain_spread=_spread(times_plain),
                times_upstream=_median(times_upstream),
                times_upstream_spread=_spread(times_upstream),
                first_token_seconds=_median(firsts),
                first_token_spread=_spread(firsts),
                round_ms=_round_times(one),
                acceptance_rate=stats.acceptance_rate if side.k else None,
                mean_acceptance_length=stats.mean_acceptance_length if side.k else None,
                acceptance_rate_per_position=stats.acceptance_rate_per_position if side.k else None,
                by_class=_by_class(one, own_plain, prompts),
                same_as_plain=_same(one, plain) if plain and compares_outputs else None,
                repeats=len(one.repeats),
                load_seconds=info.load_seconds,
                peak_memory_bytes=info.peak_memory_bytes,
                device_memory_bytes=info.device_memory_bytes,
                dtype=info.dtype,
                device=info.device,
                packing=info.packing,
                versions=info.versions,
                hardware=info.hardware,
            )
        )
    return tuple(rows)


def _what(side: Side) -> dict[str, Any]:
    way = side.group.way
    return {
        "backend": side.group.backend,
        "upstream": side.upstream or None,
        "drafter": way.drafter if side.k else None,
        "method": way.method if side.k else None,
        "num_speculative_tokens": side.k,
    }


def _round_times(one: _Measured) -> RoundTimes | None:
    """The time of a round, in the shares that the parts had where rounds were split."""
    total = _median(one.each(one.round_ms))
    if total is None:
        return None
    whole = sum(call.stats.decode_seconds or 0.0 for call in one.side.split)
    parts = [call.parts for call in one.side.split]
    if not whole or None in parts:
        return RoundTimes(total=total)
    share: dict[str, float] = {}
    for name in ("draft", "verify", "choose", "engine") if one.side.k else ("verify", "choose", "engine"):
        seconds = [getattr(part, name) for part in parts]
        if None not in seconds:
            share[name] = sum(seconds) / whole
    host = max(0.0, 1 - share.pop("engine"))
    return RoundTimes(total=total, host=host * total, **{name: value * total for name, value in share.items()})


def _by_class(
    one: _Measured, plain: _Measured | None, prompts: Sequence[MeasuredPrompt]
) -> dict[str, dict[str, float]]:
    found = {}
    for kind in classes(prompts):
        calls = {key: call for key, call in one.calls.items() if prompts[key[0]].kind == kind}
        if not calls:
            continue
        told = {"tokens_per_second": one.rate(calls)}
        common = calls.keys() & plain.calls.keys() if plain else set()
        if plain and common:
            mine, its = ({key: side.calls[key] for key in common} for side in (one, plain))
            told["times_plain"] = one.rate(mine) / plain.rate(its)
        rate = GenerationStats.total(call.stats for call in calls.values()).acceptance_rate
        if rate is not None:
            told["acceptance_rate"] = rate
        found[kind] = told
    return found


def _same(one: _Measured, plain: _Measured) -> bool | None:
    both = ((one.calls[key].digest, plain.calls[key].digest) for key in one.calls.keys() & plain.calls.keys())
    known = [(mine, its) for mine, its in both if mine and its]
    return all(mine == its for mine, its in known) if known else None


def _median(values: Iterable[float]) -> float | None:
    listed = list(values)
    return median(listed) if listed else None


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None
