"""``num_speculative_tokens="auto"`` against each fixed k and plain decoding, by a clock that is computed.

python core/benchmarks/k_replay.py --save
python core/benchmarks/k_replay.py --record tiny-e2b-mtp --target builtin:tiny-e2b --drafter auto

The loop and the schedule are the real ones. In the engine's place is what was recorded of it: how many drafts are right
at each position of the outputs of the built-in prompts of ``polydraft tune``. Steps take what ``ENGINES`` says. The
schedule sees these times with noise; the times that count have none, so that a per cent is a per cent.

``first``: the first call of a session. ``session``: a session that gets all prompts, the classes in turn, three times,
its first call included; ``one_class``: the same with prompts of one class only.

``best`` is the k that turned out best for the very prompts that it is compared on. ``held_out`` is what a user can
have: for each prompt, the k that is best for the others of its class.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polydraft
import polydraft._loop.rounds as loop
from polydraft._loop.schedule import SessionSchedule
from polydraft._measuring.prompts import built_in_prompts
from polydraft.contract import GenerationSettings, Round, Step, TokenRequest

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
from benchmarks import ROOT, Recorder, load, parser

RECORDED = Path(__file__).parent / "recorded"
LARGEST, TOKENS, REPEATS = 8, 128, 3
WRONG = 10**6
WAYS = ("first", "session", "one_class")


@dataclass
class Times:
    """Milliseconds of steps, by the number of drafts and of rows."""

    drafting: list[float]
    verifying: list[float]
    between: float
    change: float = 0.0
    """More for a step of another number of rows than the step before it: its graph is built anew."""


def line(each: float, plain: float, row: float, between: float = 0.1) -> Times:
    """``each`` draft and ``row`` take the same."""
    sizes = range(LARGEST + 1)
    return Times([each * k for k in sizes], [0.0, *(plain + row * k for k in sizes)], between)


def engines() -> dict[str, Times]:
    """Models of Gemma 4's shapes on an H100 as they were measured, and three kinds of CPU engines in round figures."""
    found = {
        # About what tiny-e2b takes in Transformers on a core: the first further row costs more than the next ones.
        "CPU, cheap rows": Times(
            [1.9 * k for k in range(LARGEST + 1)], [0.0, 4.5, 5.0, 5.3, 5.5, 5.7, 5.8, 5.9, 6.1, 6.4], 0.22
        ),
        "CPU, dear rows": line(0.25, 1.0, 0.35),
        # About what tiny-e2b takes in llama.cpp on a core.
        "CPU, dear changes": replace(line(0.12, 0.5, 0.05, 0.03), change=0.2),
    }
    rows = load(ROOT / "plugins/transformers/benchmarks/results/rounds_at_real_shapes_h100.json").rows
    measured = {
        (row.case["model"], row.case["side"]): {name: float(str(value)) for name, value in row.values.items()}
        for row in rows
        if row.case["settings"] == "greedy"
    }
    for model in ("E4B", "26B-A4B", "31B"):
        steps, drafts = measured[model, "steps"], measured[model, "rounds"]["drafts_ms"]
        plain = steps["plain_ms"]
        found[f"H100, {model}"] = line(drafts / 4, plain, (steps["round_ms"] - drafts - plain) / 4)
    return found


def record(given: Any) -> dict[str, Any]:
    """For each position of each prompt's greedy output: the drafts that the drafter has, and how many are accepted."""
    found = {}
    with (
        polydraft.load(given.target, drafter=None, dtype="float32") as plain,
        polydraft.load(given.target, drafter=given.drafter, num_speculative_tokens=LARGEST, dtype="float32") as session,
    ):
        for number, prompt in enumerate(built_in_prompts()):
            output = plain.generate(prompt.prompt, max_new_tokens=TOKENS + LARGEST, ignore_eos=True)
            drafted, accepted = [], []
            for end in range(TOKENS):
                ids = (*output.prompt_token_ids, *output.token_ids[:end])
                with session.stream(ids, max_new_tokens=LARGEST + 2, ignore_eos=True) as stream:
                    next(stream)
                    second = next(stream)
                drafted.append(second.num_draft_tokens)
                accepted.append(second.num_accepted_tokens)
            tokens = len(output.prompt_token_ids)
            found[f"{prompt.kind}-{number // 4 + 1}"] = {
                "prompt_tokens": tokens,
                "drafted": drafted,
                "accepted": accepted,
            }
    return found


def noise(seed: int) -> Iterator[float]:
    """Factors: 8% a measurement, a load that comes and goes, and one in fifty that is up to four times too long."""
    draw, load = random.Random(seed), 0.0
    while True:
        load = 0.97 * load + draw.gauss(0, 0.027)
        yield math.exp(load + draw.gauss(0, 0.08)) * (draw.uniform(1.5, 4) if draw.random() < 0.02 else 1)


class Clock:
    """Tells the loop what it would have measured, and keeps what it really took."""

    def __init__(self, times: Times, seed: int) -> None:
        self.times = times
        self.told = self.real = 0.0
        self.rows = 0
        self._noise = noise(seed)

    def goes_on(self, milliseconds: float) -> None:
        """Something took so long."""
        self.real += milliseconds
        self.told += milliseconds * next(self._noise) / 1e3


class Replayed:
    """A sequence as the loop asks it, and the call: each position's token is the position."""

    def __init__(self, recorded: dict[str, Any], clock: Clock, k: int, least: int | None) -> None:
        self.sequence = self
        self.stored = 0
        self.cancelled = lambda: False
        self.finish_reason: str | None = None
        self._recorded, self._clock = recorded, clock
        prompt_tokens = recorded["prompt_tokens"]
        self.request = TokenRequest(
            prompt_token_ids=(0,) * prompt_tokens,
            settings=GenerationSettings(max_new_tokens=TOKENS),
            seed=0,
            speculate=bool(k),
            num_speculative_tokens=k,
            least_speculative_tokens=least,
            eos_token_ids=frozenset(),
            max_total_tokens=1 << 20,
        )
        self._emitted = 0

    def report_reused(self, tokens: int) -> None:
        """None are."""

    def prefill(self, token_ids: Sequence[int]) -> Step:
        """The first token: it is not timed."""
        return Step((0,), None)

    def propose(self, newest: int, k: int) -> list[int]:
        """As many right drafts as were recorded, and wrong ones."""
        self._clock.goes_on(self._clock.times.drafting[k])
        # The token that prefill chose is output 0: what was recorded for position 1 follows it.
        at = min(newest + 1, TOKENS - 1)
        right = self._recorded["accepted"][at]
        return [newest + 1 + n if n < right else WRONG for n in range(min(k, self._recorded["drafted"][at]))]

    def verify(self, token_ids: list[int]) -> Step:
        """Position after position."""
        clock, rows = self._clock, len(token_ids)
        clock.goes_on(clock.times.verifying[rows] + (clock.times.change if rows != clock.rows else 0.0))
        clock.rows = rows
        return Step(tuple(range(token_ids[0] + 1, token_ids[0] + 1 + len(token_ids))), None)

    def rollback(self, length: int) -> None:
        """Nothing is stored."""

    def emit(self, token_ids: Sequence[int], **drafts: Any) -> Round:
        """Count them."""
        self._clock.goes_on(self._clock.times.between)
        self._emitted += len(token_ids)
        if self._emitted >= TOKENS:
            self.finish_reason = "length"
        return Round(token_ids=tuple(token_ids), **drafts)


def milliseconds(recorded: dict[str, Any], clock: Clock, k: int, session: SessionSchedule | None = None) -> float:
    """What a call takes after its first token, with a fixed k or a session's schedule."""
    call: Any = Replayed(recorded, clock, k, None if session is None else 0)
    picks = session.call(recorded["prompt_tokens"], 0) if session is not None else None
    loop.perf_counter = lambda: clock.told
    sampler: Any = SimpleNamespace()
    rounds = loop.run_rounds(call, call, sampler, None, picks)
    next(rounds)
    began = clock.real
    for _ in rounds:
        pass
    return clock.real - began


def all_but(number: int) -> Callable[[list[float]], float]:
    """The sum without one."""
    return lambda took: sum(took) - took[number]


def compared(acceptance: dict[str, Any], times: Times, seeds: int) -> dict[str, dict[str, list[float]]]:
    """By class: milliseconds of a call with each ``fixed`` k, with a ``held_out`` one, and by way, for each seed."""
    classes: dict[str, list[str]] = {}
    for name in acceptance:
        classes.setdefault(name.rpartition("-")[0], []).append(name)
    found: dict[str, dict[str, list[float]]] = {}
    for kind, names in classes.items():
        fixed = [[milliseconds(acceptance[name], Clock(times, 0), k) for name in names] for k in range(LARGEST + 1)]
        chosen = [min(fixed, key=all_but(number)) for number in range(len(names))]
        found[kind] = {
            "fixed": [statistics.mean(one) for one in fixed],
            "held_out": [took[number] for number, took in enumerate(chosen)],
            **{way: [] for way in WAYS},
        }
    for seed in range(seeds):
        clock, session = Clock(times, seed), SessionSchedule(LARGEST)
        took: dict[str, list[float]] = {kind: [] for kind in classes}
        for name in [*acceptance] * REPEATS:
            took[name.rpartition("-")[0]].append(milliseconds(acceptance[name], clock, LARGEST, session))
        for kind, names in classes.items():
            found[kind]["session"].append(statistics.mean(took[kind]))
            clock, session = Clock(times, seed), SessionSchedule(LARGEST)
            calls = [milliseconds(acceptance[name], clock, LARGEST, session) for name in names * REPEATS]
            found[kind]["one_class"].append(statistics.mean(calls))
            firsts = [
                milliseconds(acceptance[name], Clock(times, seed), LARGEST, SessionSchedule(LARGEST)) for name in names
            ]
            found[kind]["first"].append(statistics.mean(firsts))
    return found


def main() -> None:
    """Compare on everything that was recorded, or record."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=6)
    options.add_argument("--record", metavar="NAME", help="record acceptance instead, of --target with --drafter")
    options.add_argument("--target", default="builtin:tiny-e2b")
    options.add_argument("--drafter", default="auto")
    given = options.parse_args()
    if given.record:
        (RECORDED / f"{given.record}.json").write_text(json.dumps(record(given)) + "\n")
        return
    del given.target, given.drafter, given.record
    rows = Recorder(__file__, __doc__, given, constants={"tokens": TOKENS, "repeats": REPEATS})
    for path in sorted(RECORDED.glob("*.json")):
        acceptance = json.loads(path.read_text())
        for engine, times in engines().items():
            if path.stem.endswith("ngram"):
                times.drafting = [0.01] * (LARGEST + 1)
            for kind, one in compared(acceptance, times, given.seeds).items():
                plain, best, held_out = one["fixed"][0], min(one["fixed"]), statistics.mean(one["held_out"])
                values: dict[str, Any] = {"best_k": one["fixed"].index(best), "best_ms_per_token": best / TOKENS}
                values["held_out_over_best_percent"] = 100 * (held_out / best - 1)
                for way in WAYS:
                    values[f"{way}_over_best_percent"] = 100 * (statistics.mean(one[way]) / best - 1)
                    values[f"{way}_over_held_out_percent"] = 100 * (statistics.mean(one[way]) / held_out - 1)
                    values[f"{way}_over_plain_percent"] = 100 * (statistics.mean(one[way]) / plain - 1)
                    values[f"{way}_over_best_percent_worst_seed"] = 100 * (max(one[way]) / best - 1)
                rounded = {name: round(value, 3) for name, value in values.items()}
                rows.row({"recorded": path.stem, "engine": engine, "prompts": kind}, rounded)


if __name__ == "__main__":
    main()
