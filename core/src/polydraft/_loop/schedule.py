"""How many tokens to draft in the next round: k from measured times and from how many drafts were accepted lately.

A round with k drafts takes ``propose(k)`` and ``verify(k + 1 rows)`` seconds, and emits 1 + a_1 + a_1 a_2 + ... +
a_1...a_k tokens on average, a_i being the chance that draft i is accepted if those before it are. Both are measured as
the loop sees them, and k = 0 is one of the choices. The schedule takes the k with the most tokens per second.

What it does not use it forgets how to judge: so it tries another k now and then, the more rarely the more that costs.
The tokens are the same whatever it picks; only their number per round depends on time.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["CallPicks", "CallSchedule", "Schedule", "SessionSchedule"]

_RECENT = 1 / 0.88
"""Growth of a trial's weight per round: an old trial counts 0.92 times as much as the one a round later."""
_HEAVY = 1e9
"""Weights are scaled back beyond this."""
_PRIOR, _SESSION_PRIOR = 3.0, 3.0
"""Trials that the session's rate counts for in a call, and the rate of the position before it in the session."""
_LONGER = 1 / 0.98
"""The same for the rates of a session."""
_FIRST_RATE = 0.6
"""Chance that a first draft is accepted, before anything has been drafted."""
_SPIKE = 0.5
"""One measurement changes an estimate as if it differed by at most this share: garbage collection, other processes."""
_LEVEL_STEP, _SHAPE_STEP = 0.1, 0.05
_ENOUGH = 2
"""Measurements after which a size counts as known: the first may include one-time work."""
_LOOK_EVERY = 4
"""Rounds between looks for a k that is worth trying."""
_GUARD, _REST = 0.006, 0.001
"""Share of the time that may be lost by trying the nearest alternative to plain decoding or to drafting, and others."""
_FIRST_CREDIT, _MOST_CREDIT = 0.01, 2.0
"""What may be lost so at the start of a call: this share of its length, and at most so many plain rounds."""
_GUARD_EVERY = 24


class CallPicks(Protocol):
    """Picks k for the rounds of one call."""

    def pick(self, left: int) -> int:
        """k of the next round, when ``left`` tokens may still be emitted: 0 or more."""

    def count(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Count the round of the last ``pick``.

        Args:
            drafted: Number of drafts; fewer than were asked for, or none, if the drafter had no more.
            accepted: How many of them were accepted.
            draft_seconds: Time of ``propose``.
            verify_seconds: Time of ``verify``.
        """


class Schedule(Protocol):
    """Picks k for the calls of a session, some of them at once."""

    def call(self, prompt_tokens: int, least: int) -> CallPicks:
        """For a new call with a prompt of ``prompt_tokens``; no k is below ``least``, room permitting."""


class _Seconds:
    """Seconds by size, known at the sizes that were run and on straight lines between them.

    All sizes share a level, which follows the machine's load and the context's length after any measurement; a size's
    own share of it changes slowly.

    Args:
        largest: The largest size.
        start: Seconds at size 0 if nothing is done there; None: size 0 does not exist, and seconds are constant or
            grow beyond the known sizes.
    """

    def __init__(self, largest: int, *, from_zero: bool) -> None:
        self._level = 1.0
        self._shares = [0.0] * (largest + 1)
        self._counts = [0] * (largest + 1)
        self._from_zero = from_zero
        self.table = [0.0] * (largest + 1)
        """Seconds of each size; zeros until one is known."""

    def measured(self, size: int) -> int:
        """How many measurements of a size there are."""
        return self._counts[size]

    @property
    def total(self) -> int:
        """How many measurements there are."""
        return sum(self._counts)

    def add(self, size: int, seconds: float) -> None:
        """A measurement."""
        count = self._counts[size] = self._counts[size] + 1
        level, shares = self._level, self._shares
        if count <= _ENOUGH:
            share = seconds / level
            shares[size] = share if count == 1 else min(share, shares[size])
        else:
            off = max(-_SPIKE, min(seconds / (level * shares[size]) - 1, _SPIKE))
            self._level = level * (1 + _LEVEL_STEP * off)
            # The first measurements may all have been slow by chance: an estimate falls faster than it rises.
            shares[size] *= 1 + max(_SHAPE_STEP, (2 if off < 0 else 0.5) / count) * off
        self._fill()

    def _fill(self) -> None:
        level, shares, counts, table = self._level, self._shares, self._counts, self.table
        sure = [size for size in range(1, len(shares)) if counts[size] >= _ENOUGH]
        known = sure or [size for size in range(1, len(shares)) if counts[size]]
        for size in known:
            table[size] = level * shares[size]
        before = 0 if self._from_zero else known[0]
        table[1:before] = [table[before]] * (before - 1)
        for size in known:
            step = (table[size] - table[before]) / (size - before or 1)
            for between in range(before + 1, size):
                table[between] = table[before] + step * (between - before)
            before = size
        # Larger sizes go on as the known ones do from the first to the last.
        first = 0 if self._from_zero else known[0]
        step = max((table[before] - table[first]) / (before - first or 1), 0.0)
        for larger in range(before + 1, len(table)):
            table[larger] = table[before] + step * (larger - before)
        if known is sure:
            # One measurement may be slow by chance: it is believed where it is fast.
            for size, count in enumerate(counts):
                if count == 1:
                    table[size] = min(table[size], level * shares[size])


class SessionSchedule:
    """What a session has learnt: times, and acceptance over its recent calls. Calls at once may share it.

    Args:
        largest: The largest k.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.drafting = _Seconds(largest, from_zero=True)
        self.verifying = _Seconds(largest + 1, from_zero=False)
        self.catching_up = 0.0
        """Seconds for each token that the drafter has not followed."""
        self._catches: list[float] = []
        self.accepted = [0.0] * largest
        self.trials = [0.0] * largest
        self.weight = 1.0
        self.rounds = 0
        self.tried = [0] * (largest + 1)
        """The round in which each k was last picked."""
        self.drawn = 1.0  # of the rounds that asked for drafts, the share that got some

    def caught_up(self, seconds: float) -> None:
        """Measured: what each token took that the drafter had to run before it drafted."""
        self._catches = [*self._catches[-2:], seconds]
        if len(self._catches) >= _ENOUGH:
            self.catching_up = min(self._catches)

    def rates(self) -> list[float]:
        """Chance that each draft is accepted if those before it are, over the recent calls."""
        rates, before, prior = [], _FIRST_RATE, _SESSION_PRIOR * self.weight
        for accepted, trials in zip(self.accepted, self.trials, strict=True):
            before = (accepted + prior * before) / (trials + prior)
            rates.append(before)
        return rates

    def call(self, prompt_tokens: int, least: int = 0) -> CallSchedule:
        """The schedule of a call."""
        return CallSchedule(self, prompt_tokens, least)


class CallSchedule:
    """Picks k for each round of a call."""

    def __init__(self, session: SessionSchedule, prompt_tokens: int, least: int) -> None:
        self._session = session
        self._least = least
        self._missed = prompt_tokens  # tokens that the drafter has not been asked to follow
        self._weight = 1.0
        self._accepted = [0.0] * session.largest
        self._trials = [0.0] * session.largest
        self._priors = session.rates()
        self._rounds = 0
        self._asked = 0
        self._credit = -1.0  # plain rounds that may be lost by trying the nearest alternative; below 0: not known yet

    def pick(self, left: int) -> int:
        """k of the next round, when ``left`` tokens may still be emitted."""
        session, least = self._session, self._least
        drafting = session.drafting
        self._rounds += 1
        session.rounds += 1
        most = min(session.largest, left - 1)  # the bonus token always fits
        if most <= least:
            asked = most
        elif not drafting.total:
            asked = max(least, min(2, most))
        elif session.verifying.measured(1) < (1 if self._rounds < 8 else _ENOUGH):
            asked = least
        else:
            asked = self._best(most, left)
            if asked == 0 and drafting.total < _ENOUGH:
                asked = min(2, most)
        self._asked = asked
        session.tried[asked] = session.rounds
        return asked

    def _best(self, most: int, left: int) -> int:
        session = self._session
        drafting, verifying = session.drafting.table, session.verifying.table
        prior = _PRIOR * self._weight
        accepted, trials = self._accepted, self._trials
        drawn, plain = session.drawn, verifying[1]
        missed = session.catching_up * self._missed if self._missed else 0.0
        chance, tokens = 1.0, 1.0
        best, best_speed = 0, 1 / plain
        ease = 1.0
        speeds = [best_speed]
        for index in range(most):
            before = self._priors[index] * ease
            rate = (accepted[index] + prior * (before if before < 1.0 else 1.0)) / (trials[index] + prior)
            # A text that is easier or harder than the session's others is so at the next position, too.
            ease = rate / self._priors[index]
            chance *= rate
            tokens += chance
            seconds = drawn * (drafting[index + 1] + verifying[index + 2]) + (1 - drawn) * plain
            speed = (1 + drawn * (tokens - 1)) / seconds
            speeds.append(speed)
            if speed > best_speed and index >= self._least - 1:
                best, best_speed = index + 1, speed
        # To let the drafter catch up is worth it only if the rest of the call is long enough.
        if missed and left * (plain - 1 / best_speed) < missed:
            best = 0
        best = max(best, self._least)
        if self._rounds % _LOOK_EVERY == 0:
            return self._trial(speeds, best, most, left, 0.0 if best else missed / plain)
        return best

    def _trial(self, speeds: list[float], best: int, most: int, left: int, extra: float) -> int:
        """The best k, or another that has not been tried for so long that its cost is paid.

        ``extra`` is what drafting costs once, in plain rounds, as all costs here.
        """
        session, rounds, tried = self._session, self._session.rounds, self._session.tried
        drafting, verifying = session.drafting.table, session.verifying.table
        plain, top = verifying[1], speeds[best]
        if self._credit < 0:
            self._credit = min(_FIRST_CREDIT * left, _MOST_CREDIT)
        self._credit += _GUARD * _LOOK_EVERY
        guard = 0 if best else 1
        if guard >= self._least and rounds - tried[guard] >= (_GUARD_EVERY if best else _LOOK_EVERY):
            loss = extra + (drafting[guard] + verifying[guard + 1]) / plain * (1 - speeds[guard] / top)
            if loss <= self._credit:
                self._credit -= loss
                return guard
        chosen, most_owed = best, 0.0
        for k in range(max(self._least, 1), most + 1):
            if k == best:
                continue
            loss = extra + (drafting[k] + verifying[k + 1]) / plain * (1 - speeds[k] / top)
            owed = (rounds - tried[k]) * _REST - loss
            if owed > most_owed:
                chosen, most_owed = k, owed
        return chosen

    def count(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Count the round of the last ``pick``."""
        session, asked = self._session, self._asked
        session.verifying.add(drafted + 1, verify_seconds)
        if not asked:
            self._missed += 1
            return
        session.drawn += 0.05 * ((1.0 if drafted else 0.0) - session.drawn)
        if self._missed:
            # Its time includes catching up: it says nothing about ``asked`` drafts alone.
            if session.drafting.total:
                session.caught_up(max(draft_seconds - session.drafting.table[asked], 0.0) / self._missed)
            self._missed = 0
        elif drafted:
            session.drafting.add(drafted, draft_seconds)
        weight = self._weight = self._weight * _RECENT
        session.weight *= _LONGER
        for index in range(min(accepted + 1, drafted)):
            hit = 1.0 if index < accepted else 0.0
            self._trials[index] += weight
            self._accepted[index] += weight * hit
            session.trials[index] += session.weight
            session.accepted[index] += session.weight * hit
        if weight > _HEAVY:
            self._accepted = [one / weight for one in self._accepted]
            self._trials = [one / weight for one in self._trials]
            self._weight = 1.0
        if session.weight > _HEAVY:
            session.accepted = [one / session.weight for one in session.accepted]
            session.trials = [one / session.weight for one in session.trials]
            session.weight = 1.0
