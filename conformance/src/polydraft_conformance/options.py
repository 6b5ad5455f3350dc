"""Command line options and ini settings of the suite. All begin with ``polydraft``."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SuiteOptions", "add_options", "draw_seed", "read_options"]

ALL_K = (1, 2, 3, 4, 5, 6, 7, 8)
QUICK_K = (1, 4)
_SEEDS = 1_000_000
"""Small enough to be typed."""
_LONGEST = 1e5
"""Seconds of a time limit: timers of the system refuse several weeks."""
USUAL_K = 4
"""The k of checks that are not repeated for every k."""


@dataclass(frozen=True, slots=True)
class SuiteOptions:
    """The options of a run."""

    backend: str
    pairs: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    report: Path | None = None
    quick: bool = False
    must_run: bool = False
    time_limit: float = 120.0
    isolation: str = "auto"
    """Where the engines run, as ``load`` takes it."""
    one_session: bool = False
    """Load each pair once, for engines that take long to start."""
    seed: int = 0
    """Prompts, sampling seeds and random choices of the run are made from it."""

    @property
    def k_values(self) -> tuple[int, ...]:
        """The k that checks of scope ``case`` are repeated for; the usual one comes first."""
        values = QUICK_K if self.quick else ALL_K
        return (USUAL_K, *(k for k in values if k != USUAL_K))


def add_options(parser: pytest.Parser) -> None:
    """Add the options to pytest's command line."""
    group = parser.getgroup("polydraft", "polydraft conformance suite")
    parser.addini(
        "polydraft_backend", "Backend that the conformance suite runs on, unless --polydraft-backend names one."
    )
    group.addoption("--polydraft-backend", metavar="NAME", help="run the conformance suite on this installed backend")
    group.addoption(
        "--polydraft-pairs",
        metavar="A,B",
        default="",
        help="only these targets: names of built-in ones (globs), or TARGET=DRAFTER of any models (default: all "
        "built-in pairs whose format the backend takes)",
    )
    group.addoption("--polydraft-kinds", metavar="A,B", default="", help="only these drafter kinds")
    group.addoption("--polydraft-dtype", metavar="DTYPE", default="float32", help="default: float32")
    group.addoption("--polydraft-device", metavar="DEVICE", default="cpu", help="default: cpu")
    group.addoption(
        "--polydraft-isolation",
        choices=("auto", "process", "none"),
        default="auto",
        help="process: every session's engine in a worker process, which is also killed (default: auto)",
    )
    group.addoption(
        "--polydraft-report", metavar="DIR", type=Path, help="write conformance-report.json and .md into this folder"
    )
    group.addoption(
        "--polydraft-seed",
        metavar="N",
        type=int,
        help="repeat a run: prompts, sampling seeds and random choices are made from it (default: drawn; the run's end "
        "and its report name it)",
    )
    group.addoption("--polydraft-quick", action="store_true", help="fewer prompts and k 1 and 4 only")
    group.addoption(
        "--polydraft-one-session",
        action="store_true",
        help="load each pair with each drafter kind once, with k=4, and leave out checks that need further sessions: "
        "for engines that take a minute to start",
    )
    group.addoption(
        "--polydraft-must-run",
        action="store_true",
        help="fail if the backend cannot run here (default: that is a result, and the exit code is 0)",
    )
    group.addoption(
        "--polydraft-time-limit",
        metavar="SECONDS",
        type=float,
        default=120.0,
        help="limit of one check (and of loading one pair); default: 120",
    )


def read_options(config: pytest.Config) -> SuiteOptions | None:
    """The options; None where no backend is named: then the suite does nothing.

    Raises:
        pytest.UsageError: The time limit is none that can be kept.
    """
    backend = config.getoption("polydraft_backend") or config.getini("polydraft_backend")
    if not backend:
        return None
    time_limit = config.getoption("polydraft_time_limit")
    if not 0 < time_limit <= _LONGEST:
        raise pytest.UsageError(f"--polydraft-time-limit={time_limit} is not a number of seconds up to {_LONGEST:.0f}.")
    seed = config.getoption("polydraft_seed")
    if seed is None:
        seed = config.option.polydraft_seed = draw_seed()
    if not 0 <= seed < _SEEDS:
        raise pytest.UsageError(f"--polydraft-seed={seed} is not a number from 0 to {_SEEDS - 1}.")
    return SuiteOptions(
        backend=backend,
        pairs=_names(config.getoption("polydraft_pairs")),
        kinds=_names(config.getoption("polydraft_kinds")),
        dtype=config.getoption("polydraft_dtype"),
        device=config.getoption("polydraft_device"),
        isolation=config.getoption("polydraft_isolation"),
        report=config.getoption("polydraft_report"),
        quick=config.getoption("polydraft_quick"),
        must_run=config.getoption("polydraft_must_run"),
        time_limit=time_limit,
        one_session=config.getoption("polydraft_one_session"),
        seed=seed,
    )


def draw_seed() -> int:
    """A seed for a run that was given none."""
    return secrets.randbelow(_SEEDS)


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())
