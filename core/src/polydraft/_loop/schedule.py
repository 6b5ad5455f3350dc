"""How many tokens to draft in the next round: k from measured times and from how many drafts were accepted lately.

A round with k drafts takes the seconds of ``propose(k)``, of ``verify`` with k + 1 rows and of what is done between two
rounds, and emits 1 + a_1 + a_1 a_2 + ... + a_1...a_k tokens on average, a_i being the chance that draft i is accepted
if those before it are. All are measured as the loop sees them, and k = 0 is one of the choices. The schedule takes the
k with the most tokens per second.

Two views say what a_i is: drafts of one position are alike; and so are drafts that come equally long after the last
rejected one, since a text has easy and hard stretches. Each counts as much as it has been right lately.

What it does not use it forgets how to judge: so it tries another k now and then, the more rarely the more that costs.
The tokens are the same whatever it picks; only their number per round depends on time.
"""

from __future__ import annotations

from math import exp, log
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CallPicks", "CallSchedule", "Schedule", "SessionSchedule"]

_RECENT = 1 / 0.88
"""Growth of a trial's weight per round: an old trial counts 0.88 times as much as the one a round later."""
_HEAVY = 1e9
"""Weights are scaled back beyond this."""
_RECENT_RUN, _LONGER = 1 / 0.95, 1 / 0.99
"""The same for what goes by the length of the run, and for the rates of a session."""
_PRIOR, _SESSION_PRIOR = 4.0, 3.0
"""Trials that the session's rate counts for in a call, and the rate of the position before it in the session."""
_FIRST_RATE, _FIRST_DRAFTS = 0.6, 5.0
"""Chance that a first draft is accepted, before anything has been drafted, and the drafts that this is worth: each that
is accepted makes the next one likelier."""
_FIRST_K = 2
"""Drafts of the first round of a session."""
_RUN = (0, 1, 2, 3, 4, 4, 5, 5, *(6,) * 4, *(7,) * 4, *(8,) * 16, 9)
"""Class of a draft by the number of tokens since the last rejected draft; all longer runs are alike."""
_RIGHT_LATELY, _SURPRISE = 0.9, 0.001
"""How long a view's mistakes are remembered, and the least chance that it is held to."""
_NOISE, _NOISE_LEAST, _NOISE_STEP = 0.02, 0.001, 0.05
"""Variance of the logarithm of a measurement: at first, at least, and how fast what is seen of it counts."""
_LEVEL_FIRST, _LEVEL_WANDERS = 0.1, 0.003
"""The same of the level, before the first measurement and added by each."""
_SLOPE_FIRST, _SLOPE_WANDERS = 1.0, 0.000002
"""Variance of the slope, relative to its square, and what each measurement adds, relative to the line's."""
_OWN, _OWN_KNOWN = 0.003, 30
"""Variance of the logarithm of a size's own deviation from the line, and the measurements after which it is steady."""
_ONE_TIME = 10.0
"""A size's first measurement may include one-time work: if it is slow, its variance is so much larger."""
_FAR = 2.0
"""Standard deviations by which a measurement counts as off at most: garbage collection, other processes."""
_ENOUGH = 2
"""Measurements after which it is known what catching up costs: the first may include one-time work."""
_HARDLY = 0.03
"""A longer draft is not thought of where all of it is accepted less often."""
_STAY = 4.0
"""Rounds that a change of k is thought to be for: what it costs is spread over them."""
_CHANGE_STEP, _CHANGE_LEAST = 0.1, 0.02
"""How fast what is seen of a change's cost counts, and the share of a step that is not told from noise."""
_TICK = 1e-9
"""The shortest time, where the clock did not move."""
_LOOK_EVERY = 4
"""Rounds between looks for a k that is worth trying."""
_SETTLED, _LOOK_RARELY = 8, 16
"""Rounds in a row without drafts, after which such looks, and with them all thinking, are so many rounds apart: little
is new, and where steps are short, thinking takes a share of them."""
_GUARD, _REST = 0.006, 0.0012
"""Share of the time that may be lost by trying the nearest alternative to plain decoding or to drafting, and others."""
_FIRST_CREDIT, _MOST_CREDIT = 0.005, 2.0
"""What may be lost so at the start of a call: this share of its length, and at most so many plain rounds."""
_WORTH = 0.4
"""So much may be lost to try drafts that gain this much, if all of them are right; and less, where they gain less."""
_GUARD_EVERY, _ANYWAY_EVERY = 24, 400
"""Rounds between two trials of that alternative: at least, and whatever it is thought to cost."""
_YOUNG, _MEASURE_EVERY = 40, 16
"""Rounds of a session in which estimates are brought up to date at each of them; after that, now and then."""


class CallPicks(Protocol):
    """Picks k for the rounds of one call."""

    def pick(self, left: int) -> tuple[int, int]:
        """k of the next round, when ``left`` tokens may still be emitted: 0 or more; and how many rounds repeat it.

        Only a round without drafts is repeated, and then the last one is counted in place of all.
        """

    def count(
        self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float, between: float = 0.0
    ) -> None:
        """Count the round of the last ``pick``, or the last one that repeated it.

        Args:
            drafted: Number of drafts; fewer than were asked for, or none, if the drafter had no more.
            accepted: How many of them were accepted.
            draft_seconds: Time of ``pick`` and ``propose``.
            verify_seconds: Time of ``verify``.
            between: Time from the end of the last round's ``verify`` to this round: text, statistics, the caller.
        """


class Schedule(Protocol):
    """Picks k for the calls of a session, some of them at once."""

    def call(self, prompt_tokens: int, least: int) -> CallPicks:
        """For a new call with a prompt of ``prompt_tokens``; no k is below ``least``, room permitting."""


class _Seconds:
    """Seconds by size: ``level * (1 + slope * (size - 1))``, with a small deviation of each size's own.

    The level follows the machine's load and the context's length after any measurement; the slope and the deviations
    change slowly. Estimates are those of an extended Kalman filter on the logarithms of the measurements, so a few of
    them at any two sizes say what the others take.

    Args:
        largest: The largest size.
        slope: What the slope is thought to be before anything is known.
    """

    def __init__(self, largest: int, *, slope: float) -> None:
        self._level = 0.0
        self._slope = slope
        self._own = [0.0] * (largest + 1)
        self._counts = [0] * (largest + 1)
        self._noise = _NOISE
        # Variances of level and slope, and their covariance in between.
        self._p, self._pq, self._q = _LEVEL_FIRST, 0.0, _SLOPE_FIRST * max(slope, 0.3) ** 2
        self.total = 0
        """How many measurements there are."""
        self.table = [0.0] * (largest + 1)
        """Seconds of each size; zeros until one is known."""

    def add(self, size: int, seconds: float) -> None:
        """A measurement."""
        x = size - 1
        line = 1 + self._slope * x
        seen = log(seconds if seconds > _TICK else _TICK)
        if not self.total:
            self._level = seen - log(line)
        self.total += 1
        count = self._counts[size] = self._counts[size] + 1
        # The level wanders, the slope hardly does.
        p, pq, q = self._p + _LEVEL_WANDERS, self._pq, self._q + _SLOPE_WANDERS * line * line
        h = x / line
        off = seen - self._level - log(line) - self._own[size]
        own = _OWN / count if count < _OWN_KNOWN else _OWN / _OWN_KNOWN
        noise = self._noise
        if count == 1 and off > 0:
            noise *= _ONE_TIME  # may include one-time work
        gain_p, gain_q = p + h * pq, pq + h * q
        variance = gain_p + h * gain_q + own + noise
        # What is far off counts as if it were less: garbage collection, other processes.
        most = _FAR * variance**0.5
        if off > most:
            off = most
        elif off < -most:
            off = -most
        if count > 1:
            seen = off * off - variance + noise
            self._noise += _NOISE_STEP * (max(seen, _NOISE_LEAST) - self._noise)
        share_p, share_q = gain_p / variance, gain_q / variance
        self._level += share_p * off
        self._slope = max(self._slope + share_q * off, 0.0)
        self._own[size] += own / variance * off
        self._p, self._pq, self._q = p - share_p * gain_p, pq - share_p * gain_q, q - share_q * gain_q

    def fill(self) -> None:
        """Write the table."""
        if not self.total:
            return
        level, slope = exp(self._level), self._slope
        table, own = self.table, self._own
        for size in range(1, len(table)):
            table[size] = level * (1 + slope * (size - 1)) * (1 + own[size])


class _Rates:
    """How often drafts of each class were accepted, where a trial counts less the older it is."""

    def __init__(self, classes: int, longer: float) -> None:
        self.accepted = [0.0] * classes
        self.trials = [0.0] * classes
        self.weight = 1.0
        self._longer = longer

    def add(self, classes: Sequence[int], accepted: int) -> None:
        """A draft of each class was tried, and so many of them were accepted."""
        weight = self.weight = self.weight * self._longer
        for index, one in enumerate(classes):
            self.trials[one] += weight
            if index < accepted:
                self.accepted[one] += weight
        if weight > _HEAVY:
            self.accepted = [one / weight for one in self.accepted]
            self.trials = [one / weight for one in self.trials]
            self.weight = 1.0

    def chances(self) -> list[float]:
        """Of each class; what has hardly been tried is a little likelier to be accepted than the class before it."""
        chances, before, prior = [], _FIRST_RATE, _SESSION_PRIOR * self.weight
        for number, (accepted, trials) in enumerate(zip(self.accepted, self.trials, strict=True)):
            one = (accepted + prior * before) / (trials + prior)
            chances.append(one)
            before = one + (1 - one) / (_FIRST_DRAFTS + number)
        return chances


class _Acceptance:
    """The chances of a call's drafts, in the light of its session's.

    Args:
        by_position: The session's rates of drafts by their position.
        by_run: The same by the length of the run.
        right: How right the two views have been in the session: sums of logarithms, changed by ``count``.
    """

    def __init__(self, by_position: _Rates, by_run: _Rates, right: list[float]) -> None:
        self._sessions = by_position, by_run
        self._right = right
        self._by_position = _Rates(len(by_position.trials), _RECENT)
        self._by_run = _Rates(len(by_run.trials), _RECENT_RUN)
        chances = by_position.chances()
        # A text that is easier or harder at one position than the session's others is so at the next one, too.
        self._steps = [one / before for one, before in zip(chances, [1.0, *chances], strict=False)]
        self._usual = by_run.chances()
        self._run = 0
        self._views: tuple[list[float], list[float]] = [], []
        self._chances: list[float] = []  # until the next count

    def chances(self, most: int) -> list[float]:
        """That each of ``most`` drafts, or of more, is accepted if those before it are."""
        if len(self._chances) >= most:
            return self._chances
        rates = self._by_position
        prior = _PRIOR * rates.weight
        chance, by_position = 1.0, []
        for step, accepted, trials in zip(self._steps[:most], rates.accepted, rates.trials, strict=False):
            chance *= step
            chance = (accepted + prior * (chance if chance < 1.0 else 1.0)) / (trials + prior)
            by_position.append(chance)
        rates = self._by_run
        prior = _PRIOR * rates.weight
        by_run = [
            (rates.accepted[one] + prior * self._usual[one]) / (rates.trials[one] + prior)
            for one in self._classes(most)
        ]
        self._views = by_position, by_run
        odds = exp(max(min(self._right[1] - self._right[0], 30.0), -30.0))
        share = odds / (1 + odds)
        self._chances = [one + share * (other - one) for one, other in zip(by_position, by_run, strict=True)]
        return self._chances

    def _classes(self, drafts: int) -> list[int]:
        """By the run of each draft."""
        last = len(_RUN) - 1
        return [_RUN[run if run < last else last] for run in range(self._run, self._run + drafts)]

    def count(self, drafted: int, accepted: int) -> None:
        """Count a round's drafts."""
        tried = accepted + 1 if accepted < drafted else drafted
        if len(self._views[0]) < tried:
            self.chances(tried)
        for number, view in enumerate(self._views):
            said = 1.0
            for index in range(tried):
                one = view[index] if index < accepted else 1 - view[index]
                said *= one if one > _SURPRISE else _SURPRISE
            self._right[number] = _RIGHT_LATELY * self._right[number] + log(said)
        positions, runs = range(tried), self._classes(tried)
        for rates in (self._by_position, self._sessions[0]):
            rates.add(positions, accepted)
        for rates in (self._by_run, self._sessions[1]):
            rates.add(runs, accepted)
        self._run = self._run + accepted + 1 if accepted == drafted else 0
        self._chances = []


class SessionSchedule:
    """What a session has learnt: times, and acceptance over its recent calls. Calls at once may share it.

    Args:
        largest: The largest k.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.drafting = _Seconds(largest, slope=1.0)
        self.verifying = _Seconds(largest + 1, slope=0.1)
        self.seconds = [0.0] * (largest + 1)
        """Of a round that asks for k drafts, and gets none as often as lately."""
        self.between = _Seconds(1, slope=0.0)
        """From a round that emitted a single token to the next one. What a token costs there, it costs with every k."""
        self.changing = 0.0
        """Seconds more of ``verify`` after one of another number of rows: some engines plan their work anew."""
        self._change = 0.0
        self.catching_up = 0.0
        """Seconds for each token that the drafter has not followed."""
        self._catches: list[float] = []
        self._by_position = _Rates(largest, _LONGER)
        self._by_run = _Rates(_RUN[-1] + 1, _LONGER)
        self._right = [0.0, 0.0]
        self.rounds = self.measured = 0  # so far, and when the seconds were last brought up to date
        self.tried = [0] * (largest + 1)
        """The round in which each k was last picked."""
        self.drawn = 1.0  # of the rounds that asked for drafts, the share that got some

    def measure(self) -> None:
        """Bring the seconds up to date."""
        self.measured = self.rounds
        for one in (self.drafting, self.verifying, self.between):
            one.fill()
        between, drawn = self.between.table[1], self.drawn
        drafting, verifying = self.drafting.table, self.verifying.table
        plain = self.seconds[0] = verifying[1] + between
        for k in range(1, self.largest + 1):
            self.seconds[k] = drawn * (drafting[k] + verifying[k + 1] + between) + (1 - drawn) * plain

    def changed(self, rows: int, seconds: float) -> None:
        """Measured: what ``verify`` took after one of another number of rows."""
        usual = self.verifying.table[rows]
        if usual:
            more = max(min(seconds - usual, usual / 2), -usual / 2)
            self._change += _CHANGE_STEP * (more - self._change)
            # What may be noise is none.
            self.changing = max(self._change - _CHANGE_LEAST * usual, 0.0)
        self.verifying.add(rows, seconds - self.changing)

    def caught_up(self, seconds: float) -> None:
        """Measured: what each token took that the drafter had to run before it drafted."""
        self._catches = [*self._catches[-2:], seconds]
        if len(self._catches) >= _ENOUGH:
            self.catching_up = min(self._catches)

    def acceptance(self) -> _Acceptance:
        """That of a new call."""
        return _Acceptance(self._by_position, self._by_run, self._right)

    def call(self, prompt_tokens: int, least: int = 0) -> CallSchedule:
        """The schedule of a call."""
        return CallSchedule(self, prompt_tokens, least)


class CallSchedule:
    """Picks k for each round of a call."""

    def __init__(self, session: SessionSchedule, prompt_tokens: int, least: int) -> None:
        self._session = session
        self._least = least
        self._missed = prompt_tokens  # tokens that the drafter has not been asked to follow
        self._acceptance = session.acceptance()
        self._rounds = 0
        self._asked = 0
        self._again = 0  # rounds that repeat the last choice
        self._rows = 0  # of the last round's ``verify``
        self._plainly = 0  # rounds without drafts since one of drafts was best
        self._alone = False  # whether the last round emitted a single token
        self._looked = 0  # the round of the last look
        self._credit = 0.0  # plain rounds that may be lost by trying the nearest alternative
        self._trying = 0.0  # tokens per second of the best k, in a round that tries another one for the credit

    def pick(self, left: int) -> tuple[int, int]:
        """k of the next round, when ``left`` tokens may still be emitted, and how many rounds repeat it."""
        session, least = self._session, self._least
        drafting = session.drafting
        self._rounds += 1
        session.rounds += 1
        if self._rounds == 1:
            self._credit = -1.0
        self._again = 0
        most = min(session.largest, left - 1)  # the bonus token always fits
        if most <= least:
            asked = most
        elif not drafting.total:
            asked = max(least, min(_FIRST_K, most))
        else:
            asked = self._best(most, left)
            if asked == 0 and drafting.total < _ENOUGH:
                asked = min(2, most)
            elif not asked:
                self._rest(left)
        self._asked = asked
        if not asked:
            self._missed += 1 + self._again
        session.tried[asked] = session.rounds
        return asked, self._again

    def _rest(self, left: int) -> None:
        """The choice not to draft stands until the next look for a k that is worth trying: nothing is learnt before."""
        session = self._session
        if session.rounds >= _YOUNG and not self._trying:
            every = _LOOK_EVERY if self._plainly < _SETTLED else _LOOK_RARELY
            self._again = min(every - self._rounds % every, left) - 1
        self._rounds += self._again
        session.rounds += self._again
        self._plainly += 1 + self._again

    def _best(self, most: int, left: int) -> int:
        session, least = self._session, self._least
        looks = self._rounds % _LOOK_EVERY == 0
        if session.rounds < _YOUNG or session.rounds - session.measured >= _MEASURE_EVERY:
            session.measure()
        seconds, drawn, change, rows = session.seconds, session.drawn, session.changing / _STAY, self._rows
        chance, tokens = 1.0, 1.0
        best, best_speed = 0, 1 / (seconds[0] + (0.0 if rows == 1 else change))
        speeds = [best_speed]
        for k, rate in enumerate(self._acceptance.chances(most)[:most], 1):
            chance *= rate
            if chance < _HARDLY:
                break
            tokens += drawn * chance
            speed = tokens / (seconds[k] + (0.0 if rows == k + 1 else change))
            speeds.append(speed)
            if speed > best_speed and k >= least:
                best, best_speed = k, speed
        missed = 0.0
        if self._missed:
            missed = session.catching_up * self._missed
            # To let the drafter catch up is worth it only if the rest of the call is long enough.
            if left * (seconds[0] - 1 / best_speed) < missed:
                best = 0
        best = max(best, least)
        if best:
            self._plainly = 0
        return self._trial(speeds, best, 0.0 if best else missed, left) if looks and best < len(speeds) else best

    def _trial(self, speeds: list[float], best: int, missed: float, left: int) -> int:
        """The best k, or another that has not been tried for so long that its cost is paid.

        Costs are in plain rounds; ``missed`` is in seconds, what drafting costs once.
        """
        session, rounds, tried = self._session, self._session.rounds, self._session.tried
        seconds, top = session.seconds, speeds[best]
        plain = seconds[0]
        missed += 2 * session.changing  # to the other k and back
        worth = 1.0 if best else self._worth()
        if self._credit == -1.0:
            self._credit = worth * min(_FIRST_CREDIT * left / top / plain, _MOST_CREDIT)
        self._credit += worth * _GUARD * (self._rounds - self._looked) * seconds[best] / plain
        self._looked = self._rounds
        guard = 0 if best else 1
        age = rounds - tried[guard]
        if guard >= self._least and age >= (_GUARD_EVERY if best else _LOOK_EVERY) and guard < len(speeds):
            loss = (missed + seconds[guard] * (1 - speeds[guard] / top)) / plain
            # After a long time in any case: what was measured then may have been wrong.
            if loss <= self._credit > 0 or age >= _ANYWAY_EVERY:
                self._trying = top
                self._credit -= missed / plain
                return guard
        chosen, most_owed = best, 0.0
        for k in range(max(self._least, 1), len(speeds)):
            owed = (rounds - tried[k]) * worth * _REST - (missed + seconds[k] * (1 - speeds[k] / top)) / plain
            if owed > most_owed and k != best:
                chosen, most_owed = k, owed
        return chosen

    def _worth(self) -> float:
        """Of what may be lost to try drafts, the share that they are worth by what they gain at best: 0 to 1."""
        seconds = self._session.seconds
        gain = max((k + 1) / took for k, took in enumerate(seconds)) * seconds[0] - 1
        return min(gain / _WORTH, 1.0)

    def count(
        self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float, between: float = 0.0
    ) -> None:
        """Count the round of the last ``pick``, or the last one that repeated it."""
        session, asked = self._session, self._asked
        again = self._again > 0
        # Every second round says enough about times.
        timed = again or session.rounds < _YOUNG or not self._rounds % 2
        if (again or self._alone) and timed:
            session.between.add(1, between)
        self._alone = not accepted
        if self._trying:
            # What it really cost: the chance that it was tried for may be an old one.
            seconds = session.seconds
            self._credit -= (seconds[asked] - (accepted + 1) / self._trying) / seconds[0]
            self._credit = min(self._credit, _MOST_CREDIT)
            self._trying = 0.0
        rows = drafted + 1
        if rows != self._rows and not again:
            session.changed(rows, verify_seconds)
        elif timed:
            session.verifying.add(rows, verify_seconds)
        self._rows = rows
        if not asked:
            return
        session.drawn += 0.05 * ((1.0 if drafted else 0.0) - session.drawn)
        if self._missed:
            # Its time includes catching up: ``asked`` drafts alone take less.
            drafting = session.drafting
            if drafting.total:
                drafting.fill()
                more = draft_seconds - drafting.table[asked]
                session.caught_up(max(more, 0.0) / self._missed)
                if more < 0 and drafted:
                    drafting.add(drafted, draft_seconds)
            self._missed = 0
        elif drafted and timed:
            session.drafting.add(drafted, draft_seconds)
        if drafted:
            self._acceptance.count(drafted, accepted)
