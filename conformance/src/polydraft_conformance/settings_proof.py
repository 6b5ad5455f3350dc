"""Whether tokens were chosen as the settings say, and if not, what was done instead.

Where the target's logits are known, the oracle (``oracle.py``) gives the exact probabilities of each token for the very
prefix that it follows. Three things are compared with them, for every token, on drafted rows as on others:

- *Support.* A token that the settings exclude is a defect at once. Tokens at a filter's edge, where rounding decides,
  are not judged.
- *The rule.* Engines that choose by the core's rule (noise of seed, stream and position) have one right token at each
  place: it is calculated again.
- *Evidence.* For other samplers, each conceivable fault ("top_p is ignored", "penalties are counted once a round")
  says how probable the tokens are if it is there. Their ratio to the true probabilities is a bet against the engine
  that an honest one wins on average: it exceeds x with a probability of at most 1/x, however often one looks (Ville
  1939; Shafer and Vovk 2019). Three more bets, on no fault in particular, are on where tokens lie among the more and
  less probable ones (``place``): in all outputs, after the token before, and in the output so far (noise that comes
  again in every round), with the weights of Krichevsky and Trofimov (1981). Logits that are off by at most ``slack``
  change no probability by more than a factor exp(2 * slack / temperature), which each bet pays for.

The message names the fault with the largest evidence, and the rows that show it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from polydraft.sampling.noise import row_keys
from polydraft.sampling.numpy_ops import NumpyOps

from polydraft_conformance.oracle import OnTheEdgeError, Row, adjusted, next_token

if TYPE_CHECKING:
    from polydraft.contract import GenerationSettings, TokenLogprobs

__all__ = [
    "FALSE_ALARM",
    "LIMIT",
    "Choice",
    "Evidence",
    "Trial",
    "faults_of",
    "judge_by_rule",
    "judge_logprobs",
    "place",
]

FALSE_ALARM = 1e-9
"""Probability that an honest engine fails one ``Evidence``; a run of the suite gathers some hundred."""
_BETS = 400
"""More than there are faults times places, alone and pooled."""
LIMIT = math.log(_BETS / FALSE_ALARM)
"""What a bet must have won to fail the engine, as a logarithm."""
_CELLS = 8
_BONUS = "in the bonus row after all drafts"
_RECENT = 64
"""Tokens that llama.cpp's ``repeat_last_n`` counts by default."""
_RIGHT = 60
"""Right tokens that the faults are tried on."""
_HEDGE = 0.01
"""Share of a bet that is kept, so that one improbable token does not lose it all."""
_NOISES = 128
"""Uniform noises that are told apart, where it is asked whether the same one comes again."""
_EDGES = np.linspace(0.0, 1.0, _NOISES + 1)
_OPS = NumpyOps()


@dataclass(frozen=True, slots=True)
class Choice:
    """One token that an engine chose."""

    token: int
    output: tuple[int, ...]
    """The tokens after the prompt that it follows, drafts included."""
    logits: Row
    """The target's raw logits there, shape (vocab,)."""
    row: int | None
    """Place in its round: row 0 follows the newest token, row i the i-th draft. None: not known."""
    is_last: bool = False
    """The bonus token after all k drafts."""
    is_emitted: bool = True
    """False: it follows a rejected draft, and was never part of the output."""

    @property
    def places(self) -> tuple[str, ...]:
        """The groups of rows that it belongs to, in words."""
        found = ["in all rows"]
        if self.row is None:
            return tuple(found)
        if not self.output:
            return (*found, "in the first token, that of the prefill")
        found.append("in drafted rows" if self.row else "in the first row of a round")
        if self.is_last:
            found.append(_BONUS)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Trial:
    """One generation whose choices are known."""

    settings: GenerationSettings
    prompt: tuple[int, ...]
    choices: Sequence[Choice]
    eos_token_ids: frozenset[int]
    slack: float
    """How far the logits may be from those that were chosen from."""
    seed: int = 0
    """The effective seed, of engines that choose by the core's rule."""
    stream: int = 0

    def probabilities(self, choice: Choice) -> Row:
        """Under the settings, shape (vocab,).

        Raises:
            OnTheEdgeError: They cannot be told: a token lies at a filter's edge.
        """
        return next_token(
            choice.logits, self.settings, self.prompt, choice.output, self.eos_token_ids, slack=self.slack
        )


Probabilities = Callable[[Trial, Choice], Row]

_NEUTRAL: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "banned_token_ids": (),
    "forced_token_ids": {},
    "min_new_tokens": 0,
    "logits_processor": None,
}
"""The values with which settings do nothing."""


def faults_of(settings: GenerationSettings) -> dict[str, Probabilities]:
    """What can be wrong under these settings, in words -> the probabilities if it is."""
    found: dict[str, Probabilities] = {}
    changed = {name: value for name, value in _NEUTRAL.items() if getattr(settings, name) != value}
    for name, value in changed.items():
        if name == "temperature":
            continue
        words = f"`{name}` is ignored"
        if name.endswith("_penalty") and getattr(settings, name) < value:
            words = f"`{name}` is ignored (it is {getattr(settings, name):g}, which favours earlier tokens)"
        if name == "min_new_tokens":
            found["`min_new_tokens` is ignored for stop ids"] = _with(stop_token_ids=())
            found["`min_new_tokens` is ignored for EOS"] = _without_eos
        found[words] = _with(**{name: value})
    if settings.top_k:
        found["`top_k` keeps one token too many"] = _with(top_k=settings.top_k + 1)
    penalties = {name for name in changed if name.endswith("_penalty")}
    if penalties:
        found["penalties are counted once a round: they miss the drafts before a row"] = _of_the_round_before
    if len(penalties) > 1:
        found["all penalties are ignored"] = _with(**{name: _NEUTRAL[name] for name in penalties})
    both = settings.presence_penalty + settings.frequency_penalty
    if penalties - {"repetition_penalty"}:
        found["the prompt's tokens count for `presence_penalty` and `frequency_penalty`"] = _prompt_is_output
    if "repetition_penalty" in penalties:
        found["the prompt's tokens do not count for `repetition_penalty`"] = _no_prompt
        found["`repetition_penalty` divides negative logits, which it must multiply"] = _divided
    if penalties:
        found[f"penalties look at the last {_RECENT} tokens only"] = _recent
    if "frequency_penalty" in penalties:
        words = "`frequency_penalty` is subtracted once a token, not once an occurrence"
        found[words] = _with(presence_penalty=both, frequency_penalty=0.0)
    if "presence_penalty" in penalties:
        words = "`presence_penalty` is subtracted once an occurrence, not once a token"
        found[words] = _with(presence_penalty=0.0, frequency_penalty=both)
    filters = sorted({"top_p", "min_p", "typical_p"} & changed.keys())
    if settings.temperature not in {0.0, 1.0} and filters:
        found[f"the temperature is applied after {' and '.join(f'`{name}`' for name in filters)}"] = _temperature_last
    if len(changed.keys() - {"temperature"}) > 1:
        ignored = {name: value for name, value in changed.items() if name != "temperature"}
        found["all settings but the temperature are ignored"] = _with(**ignored)
    if settings.temperature > 0.0:
        if settings.temperature != 1.0:
            low = "a temperature below 1 is taken as 1", "a temperature above 1 is taken as 1"
            found[low[settings.temperature > 1.0]] = _with(temperature=1.0)
        found["the temperature is ignored: tokens are chosen greedily"] = _with(temperature=0.0)
        found["tokens are drawn too evenly"] = _sharpened(0.7)
        found["tokens are drawn too sharply: the most probable ones come out too often"] = _sharpened(1.5)
    return found


def _with(**changes: Any) -> Probabilities:
    """Other settings."""

    def probabilities(trial: Trial, choice: Choice) -> Row:
        settings = trial.settings.model_copy(update=changes)
        return next_token(choice.logits, settings, trial.prompt, choice.output, trial.eos_token_ids)

    return probabilities


def _without_eos(trial: Trial, choice: Choice) -> Row:
    return next_token(choice.logits, trial.settings, trial.prompt, choice.output)


def _of_the_round_before(trial: Trial, choice: Choice) -> Row:
    row = choice.row or 0
    seen = choice.output[: len(choice.output) - row]
    # Places in the output stay what they are: forced tokens and min_new_tokens do not depend on penalties.
    later = trial.settings.model_copy(
        update={
            "forced_token_ids": {index - row: token for index, token in trial.settings.forced_token_ids.items()},
            "min_new_tokens": max(0, trial.settings.min_new_tokens - row),
        }
    )
    return next_token(choice.logits, later, trial.prompt, seen, trial.eos_token_ids)


def _prompt_is_output(trial: Trial, choice: Choice) -> Row:
    length = len(trial.prompt)
    later = trial.settings.model_copy(
        update={
            "forced_token_ids": {index + length: token for index, token in trial.settings.forced_token_ids.items()},
            "min_new_tokens": trial.settings.min_new_tokens + length if trial.settings.min_new_tokens else 0,
        }
    )
    return next_token(choice.logits, later, (), (*trial.prompt, *choice.output), trial.eos_token_ids)


def _no_prompt(trial: Trial, choice: Choice) -> Row:
    return next_token(choice.logits, trial.settings, (), choice.output, trial.eos_token_ids)


def _divided(trial: Trial, choice: Choice) -> Row:
    seen = np.unique(np.asarray([*trial.prompt, *choice.output], dtype=np.int64))
    row = choice.logits.astype(np.float64)
    values = row[seen]
    # What is multiplied next comes out divided.
    row[seen] = np.where(values < 0, values / trial.settings.repetition_penalty**2, values)
    return next_token(row, trial.settings, trial.prompt, choice.output, trial.eos_token_ids)


def _recent(trial: Trial, choice: Choice) -> Row:
    cut = max(0, len(choice.output) - _RECENT)
    prompt = trial.prompt[len(trial.prompt) - max(0, _RECENT - len(choice.output)) :] if not cut else ()
    later = trial.settings.model_copy(
        update={
            "forced_token_ids": {index - cut: token for index, token in trial.settings.forced_token_ids.items()},
            "min_new_tokens": max(0, trial.settings.min_new_tokens - cut),
        }
    )
    return next_token(choice.logits, later, prompt, choice.output[cut:], trial.eos_token_ids)


def _temperature_last(trial: Trial, choice: Choice) -> Row:
    """Filters see the probabilities at temperature 1."""
    shares = _with(temperature=1.0)(trial, choice)
    return _power(shares, 1 / trial.settings.temperature)


def _sharpened(power: float) -> Probabilities:
    honest = _with()
    return lambda trial, choice: _power(honest(trial, choice), power)


def _power(shares: Row, power: float) -> Row:
    changed: Row = np.where(shares > 0, shares**power, 0.0)
    changed /= changed.sum()
    return changed


@dataclass(slots=True)
class Evidence:
    """What sampled tokens say against the engine, gathered token by token.

    Args:
        random: Says where in its interval a token lies: has nothing to do with the tokens.
        pool: The evidence under other settings: a fault that shows a little under each shows there.
    """

    random: Random
    pool: Evidence | None = None
    left_out: int = 0
    """Tokens that were not judged, because rounding decides there what a filter keeps."""
    judged: list[tuple[Trial, Choice]] = field(default_factory=list)
    impossible: list[tuple[Trial, Choice]] = field(default_factory=list)
    """Tokens that the settings exclude."""
    bets: dict[tuple[str, str], float] = field(default_factory=dict)
    """(fault, place) -> logarithm of what a bet on it has won."""
    _cells: dict[str, Counter[int]] = field(default_factory=dict)
    _pairs: dict[str, Counter[tuple[int, int]]] = field(default_factory=dict)

    def add(self, trial: Trial) -> None:
        """Take the tokens of one more generation into account; only tokens of the output."""
        faults = faults_of(trial.settings)
        temperature = trial.settings.temperature
        price = 2 * trial.slack / temperature if temperature else 0.0
        before: tuple[int, tuple[int, int]] | None = None
        rows: dict[tuple[str, str], Row] = {}
        for choice in trial.choices:
            if not choice.is_emitted:
                continue
            try:
                shares = trial.probabilities(choice)
            except OnTheEdgeError:
                self.left_out += 1
                continue
            self.judged.append((trial, choice))
            share = shares[choice.token]
            if share <= 0.0:
                self.impossible.append((trial, choice))
                continue
            if not temperature or share > 1 - 1e-9:
                continue
            for words, fault in faults.items():
                other = fault(trial, choice)[choice.token]
                self._win(words, choice, math.log((1 - _HEDGE) * other / share + _HEDGE) - price)
            inside = self.random.random()
            cell = int(place(shares, choice.token, inside) * _CELLS)
            # Engines that invert the cumulated probabilities do so in the order of ids, or after sorting.
            cells = cell, int(place(shares, choice.token, inside, by_id=True) * _CELLS)
            index = len(choice.output)
            previous = before[1] if before is not None and before[0] == index - 1 else None
            self._bet_on(choice, cell, price)
            self._bet_on_noise(choice, cells, previous, rows, shares, price)
            before = index, cells

    def _bet_on(self, choice: Choice, cell: int, price: float) -> None:
        """Bet on where a token lies, from where earlier ones did."""
        for where in choice.places:
            counts = self._cells.setdefault(where, Counter())
            won = math.log(_CELLS * (counts[cell] + 0.5) / (counts.total() + _CELLS / 2)) - price
            self._win("tokens do not follow the target's probabilities", choice, won, where)
            counts[cell] += 1

    def _bet_on_noise(
        self,
        choice: Choice,
        cells: tuple[int, int],
        previous: tuple[int, int] | None,
        rows: dict[tuple[str, str], Row],
        shares: Row,
        price: float,
    ) -> None:
        """Bet on where a token lies, in both orders, from the token before, and from the output's earlier rounds.

        Args:
            choice: The token's.
            cells: Where it lies.
            previous: Where the token before it does, if that was judged.
            rows: (order, row of a round) -> how probable each noise is, were it the same in all rounds of this output.
            shares: The probabilities of all tokens.
            price: What the slack costs.
        """
        starts = place(shares, choice.token, 0.0), place(shares, choice.token, 0.0, by_id=True)
        for number, order in enumerate(("", " (in the order of ids)")):
            cell = cells[number]
            for where in choice.places if previous is not None else ():
                assert previous is not None
                pairs = self._pairs.setdefault(where + order, Counter())
                # Halves of the cells: four pairs, of which the first member is known.
                first, second = 2 * previous[number] // _CELLS, 2 * cell // _CELLS
                total = pairs[first, 0] + pairs[first, 1]
                won = math.log(2 * (pairs[first, second] + 0.5) / (total + 1)) - price
                self._win(f"neighbouring tokens are not drawn independently of each other{order}", choice, won, where)
                pairs[first, second] += 1
            if choice.row is None or not choice.output:
                continue
            where = _BONUS if choice.is_last else f"in row {choice.row} of rounds" if choice.row else choice.places[-1]
            low, share = starts[number], float(shares[choice.token])
            edges = np.clip(_EDGES, low, low + share)
            inside = (edges[1:] - edges[:-1]) * _NOISES
            likely = rows.get((order, where), np.full(_NOISES, 1.0 / _NOISES))
            won = math.log((1 - _HEDGE) * max(float((likely * inside).sum()), 0.0) / share + _HEDGE) - price
            self._win(f"the noise is the same in every round of an output{order}", choice, won, where)
            likely = likely * (inside + _HEDGE)
            rows[order, where] = likely / likely.sum()

    def _win(self, words: str, choice: Choice, won: float, where: str | None = None) -> None:
        for each in choice.places if where is None else (where,):
            self.bets[words, each] = self.bets.get((words, each), 0.0) + won
            if self.pool is not None:
                self.pool.bets[words, each] = self.pool.bets.get((words, each), 0.0) + won

    @property
    def problem(self) -> str:
        """What is wrong, the cause first; empty if nothing is."""
        if self.impossible:
            return _wrong(self.impossible, self.judged)
        for bets, of in ((self.bets, "tokens there"), (self.pool.bets if self.pool else {}, "tokens of all settings")):
            if not bets:
                continue
            (words, where), won = max(bets.items(), key=lambda item: round(item[1], 6))
            if won >= LIMIT:
                cells = self._cells.get(where, Counter())
                return (
                    f"{words}, {where}: the {of} are e**{won:.0f} times as probable if so as under the settings (of "
                    f"correct samplers one in {1 / FALSE_ALARM:.0e} gets to e**{LIMIT:.0f}).\n"
                    f"{cells.total()} tokens from the most to the least probable, in {_CELLS} parts that are equally "
                    f"probable: {[cells[cell] for cell in range(_CELLS)]}."
                )
        return ""

    @property
    def is_suspicious(self) -> bool:
        """Whether it pays to look at more tokens, which bets allow: of correct samplers hardly one in a hundred is."""
        return max(self.bets.values(), default=0.0) > LIMIT / 3

    @property
    def best_token(self) -> float:
        """How probable the most probable token is, on average."""
        shares = [float(trial.probabilities(choice).max()) for trial, choice in self.judged]
        return sum(shares) / len(shares) if shares else 1.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        (words, where), won = max(self.bets.items(), key=lambda item: item[1], default=(("", ""), 0.0))
        return {
            "tokens": len(self.judged),
            "left_out": self.left_out,
            "largest_bet": {"fault": words, "rows": where, "log": round(won, 2), "limit": round(LIMIT, 2)},
            "cells": {where: [cells[cell] for cell in range(_CELLS)] for where, cells in self._cells.items()},
        }


def place(shares: Row, token: int, inside: float, *, by_id: bool = False) -> float:
    """Where a sampled token lies on [0, 1): uniform if it was drawn from ``shares``, shape (vocab,).

    Tokens in the order of falling probability own an interval as long as their probability (Rosenblatt 1952).

    Args:
        shares: Probabilities of all tokens.
        token: The one that came out.
        inside: A number in [0, 1) that has nothing to do with it.
        by_id: In the order of ids instead.
    """
    if by_id:
        before = shares[:token].sum()
    else:
        before = shares[shares > shares[token]].sum() + shares[:token][shares[:token] == shares[token]].sum()
    # Below 1: rounding must not lead to a part after the last.
    return float(min(before + inside * shares[token], 1.0 - 1e-12))


def judge_by_rule(trials: Iterable[Trial]) -> tuple[int, str]:
    """Compare choices with those of the core's rule: the largest logit, with the noise of seed, stream and position.

    Rows after a rejected draft are chosen by the rule as well.

    Args:
        trials: Generations under the same settings.

    Returns:
        How many choices were judged, and what is wrong, the cause first; empty if nothing is.
    """
    judged: list[tuple[Trial, Choice]] = []
    wrong: list[tuple[Trial, Choice]] = []
    for trial in trials:
        for choice in trial.choices:
            try:
                shares = trial.probabilities(choice)
            except OnTheEdgeError:
                continue
            judged.append((trial, choice))
            if not _follows(trial, choice, shares):
                wrong.append((trial, choice))
    return len(judged), _wrong(wrong, judged) if wrong else ""


def _follows(trial: Trial, choice: Choice, shares: Row, *, seed: int | None = None, shift: int = 0) -> bool:
    """Whether a choice is the one of the core's rule, as far as rounding allows."""
    if shares[choice.token] <= 0.0:
        return False
    possible = np.flatnonzero(shares)
    if len(possible) == 1:
        return True
    position = len(trial.prompt) + len(choice.output) + shift
    low, high = row_keys(trial.seed if seed is None else seed, trial.stream, range(position, position + 1))
    noise = _OPS.gumbel(possible[None], np.array([low]), np.array([high]))[0]
    scores = np.log(shares[possible]) + noise
    own = scores[np.searchsorted(possible, choice.token)]
    temperature = trial.settings.temperature or 1.0
    return bool(scores.max() - own <= 1e-3 + 4 * trial.slack / temperature)


def _wrong(wrong: Sequence[tuple[Trial, Choice]], judged: Sequence[tuple[Trial, Choice]]) -> str:
    """Tokens that the settings exclude, or that the rule does not choose, with the fault that explains most."""
    trial, choice = wrong[0]
    by_rule = any(trial.probabilities(choice)[choice.token] > 0.0 for trial, choice in wrong)
    where = _where([choice for _, choice in wrong], [choice for _, choice in judged])
    # Of two faults that explain as many wrong tokens, the one that gives the right ones there as well.
    faulty = {id(choice) for _, choice in wrong}
    right = [pair for pair in judged if where in pair[1].places and id(pair[1]) not in faulty][:_RIGHT]
    words, (count, _) = max(
        (
            (words, (sum(explains(*pair) for pair in wrong), sum(explains(*pair) for pair in right)))
            for words, explains in _explanations(trial.settings, by_rule=by_rule).items()
        ),
        key=lambda item: item[1],
    )
    if 2 * count <= len(wrong):
        words = (
            "tokens are not chosen by the rule (the largest logit with the noise of seed, stream and position)"
            if by_rule
            else "tokens come out that the settings exclude"
        )
        count = 0
    share = trial.probabilities(choice)[choice.token]
    return (
        f"{words}, {where}: {len(wrong)} of {len(judged)} tokens are wrong"
        + (f", {count} of them explained by this" if count else "")
        + f". The first: token {choice.token} as output token {len(choice.output)}"
        + (f" (row {choice.row} of its round)" if choice.row is not None and choice.output else "")
        + (f", after {len(trial.prompt) + len(choice.output)} tokens" if by_rule else "")
        + (
            f", which the settings exclude; they leave {_count(trial.probabilities(choice))}."
            if share <= 0.0
            else f", of probability {share:.3g}, where the noise chooses another."
        )
    )


def _count(shares: Row) -> str:
    possible = np.flatnonzero(shares)
    return f"{len(possible)} tokens" if len(possible) > 1 else f"token {possible[0]} only"


def _explanations(settings: GenerationSettings, *, by_rule: bool) -> dict[str, Callable[[Trial, Choice], bool]]:
    """What can be wrong, in words -> whether it explains a choice."""

    def of_fault(fault: Probabilities) -> Callable[[Trial, Choice], bool]:
        if by_rule:
            return lambda trial, choice: _follows(trial, choice, fault(trial, choice))
        return lambda trial, choice: bool(fault(trial, choice)[choice.token] > 0.0)

    def of_noise(**changes: Any) -> Callable[[Trial, Choice], bool]:
        return lambda trial, choice: _follows(trial, choice, trial.probabilities(choice), **changes)

    found = {words: of_fault(fault) for words, fault in faults_of(settings).items() if "drawn too" not in words}
    if by_rule and settings.temperature > 0.0:
        found["the noise is that of the position before"] = of_noise(shift=-1)
        found["the noise is that of the position after"] = of_noise(shift=1)
        found["the noise is that of the round's first row"] = lambda trial, choice: _follows(
            trial, choice, trial.probabilities(choice), shift=-(choice.row or 0)
        )
        found["the seed is ignored: the noise is that of seed 0"] = of_noise(seed=0)
        for bits in (16, 31, 32):
            found[f"the seed is cut to {bits} bits"] = lambda trial, choice, bits=bits: _follows(  # type: ignore[misc]
                trial, choice, trial.probabilities(choice), seed=trial.seed % (1 << bits)
            )
        found["the seed is rounded to a float"] = lambda trial, choice: _follows(
            trial, choice, trial.probabilities(choice), seed=int(float(trial.seed))
        )
        for period in (64, 128, 256):
            words = f"the noise repeats itself: that of position p is that of p mod {period}"
            found[words] = lambda trial, choice, period=period: _follows(  # type: ignore[misc]
                trial,
                choice,
                trial.probabilities(choice),
                shift=-((len(trial.prompt) + len(choice.output)) // period * period),
            )
    return found


def _where(wrong: Sequence[Choice], judged: Sequence[Choice]) -> str:
    """The rows in which choices are wrong: the smallest of the groups that holds them all."""
    groups = [set(choice.places) for choice in wrong]
    shared = set.intersection(*groups)
    if len(wrong) < 4:  # too few to tell the bonus row from other drafted ones
        shared -= {_BONUS}
    sizes = Counter(place for choice in judged for place in choice.places)
    return min(shared, key=lambda place: sizes[place])


def judge_logprobs(trial: Trial, entries: Sequence[TokenLogprobs], bound: float) -> str:
    """What is wrong with log-probabilities, the cause first; empty if they are those of the raw logits.

    Args:
        trial: The choices that they belong to; of rows whose logits are not all known, the others are -inf, and the
            known ones are log-probabilities.
        entries: One for each token of the output.
        bound: How far they may be off.
    """
    choices = {len(choice.output): choice for choice in trial.choices if choice.is_emitted}
    raw = {index: _log_softmax(choice.logits) for index, choice in choices.items() if index < len(entries)}
    if listed := trial.settings.logprobs:
        short = [index for index, entry in enumerate(entries) if len(entry.top) != listed]
        if short:
            return (
                f"the best tokens are not all listed: {len(entries[short[0]].top)} instead of {listed} at output token "
                f"{short[0]}, and the same number is not there for {len(short)} of {len(entries)} tokens."
            )
    off = {index: _off(row, entries[index]) for index, row in raw.items()}
    wrong = [index for index, distance in off.items() if distance > bound]
    if not wrong:
        return ""
    settings = trial.settings

    def adjusted_at(index: int) -> Row:
        return adjusted(choices[index].logits, settings, trial.prompt, choices[index].output, trial.eos_token_ids)

    def chosen_from(index: int) -> Row:
        shares = _with()(trial, choices[index])
        return np.log(np.maximum(shares, 1e-300))

    causes: dict[str, Callable[[int], Row | None]] = {
        "log-probabilities are shifted by one: they are those of the token before": lambda index: raw.get(index - 1),
        "log-probabilities are shifted by one: they are those of the token after": lambda index: raw.get(index + 1),
        "log-probabilities are those of the round's first row": lambda index: raw.get(
            index - (choices[index].row or 0)
        ),
    }
    if settings.temperature not in {0.0, 1.0}:
        words = "log-probabilities are taken after the temperature, not from the raw logits"
        causes[words] = lambda index: _log_softmax(choices[index].logits / settings.temperature)
    if settings.temperature > 0.0:
        words = "log-probabilities are taken after the filters, not from the raw logits"
        causes[words] = chosen_from
    causes["log-probabilities are taken after biases and penalties, not from the raw logits"] = lambda index: (
        _log_softmax(adjusted_at(index))
    )
    explained = {
        words: sum((row := cause(index)) is not None and _off(row, entries[index]) <= bound for index in wrong)
        for words, cause in causes.items()
    }
    words, count = max(explained.items(), key=lambda item: item[1])
    if 2 * count <= len(wrong):
        words, count = "log-probabilities are not the target's (the drafter's, or another row's)", 0
    where = _where([choices[index] for index in wrong], [choices[index] for index in raw])
    first = wrong[0]
    token = entries[first].token_id
    return (
        f"{words}, {where}: {len(wrong)} of {len(raw)} are wrong"
        + (f", {count} of them explained by this" if count else "")
        + f". The first: output token {first} ({token}) has {entries[first].logprob:.4f}, the raw logits give "
        f"{raw[first][token]:.4f}; off by up to {max(off.values()):.3g}, more than {bound:.3g}."
    )


def _off(row: Row, entry: TokenLogprobs) -> float:
    """The largest difference of an entry from a row of log-probabilities, where these are known."""
    found = [(entry.token_id, entry.logprob), *entry.top]
    distances = [abs(logprob - float(row[token])) for token, logprob in found if np.isfinite(row[token])]
    # The best ones are listed, best first, whatever their ids (equal ones may change places).
    best = np.sort(row)[::-1][: len(entry.top)]
    distances += [
        abs(logprob - float(value)) for (_, logprob), value in zip(entry.top, best, strict=True) if np.isfinite(value)
    ]
    return max(distances, default=0.0)


def _log_softmax(row: Row) -> Row:
    """Of rows that are not known as a whole, the known ones are log-probabilities already."""
    if not np.isfinite(row).all():
        return row
    shifted = row.astype(np.float64) - row.max()
    result: Row = shifted - np.log(np.exp(shifted).sum())
    return result
