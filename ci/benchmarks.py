"""Shared by all benchmarks: how a result is written, its schema, and the page that shows all results.

A distribution has ``benchmarks/NAME.py``, and its results in ``benchmarks/results/NAME[_HARDWARE].json``, one `Result`
per file. Benchmarks of the same name compare the same things in every distribution.

    python ci/benchmarks.py [--check]     # fill the tables of docs/benchmarks.md from the files, or compare them

A comment in front of each table on the page says what it shows: the file, which names of `Row.case` go ``down`` and
``across``, which ``values`` in which format (Python's; empty: as they are), and which rows (``where``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
_TABLE = re.compile(r"(<!-- table (\{[^\n]*\}) -->\n).*?(<!-- end -->\n)", re.DOTALL)
T = TypeVar("T")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Hardware(_Strict):
    """The machine of a benchmark; ``None``: not recorded."""

    processor: str | None
    cores: int | None
    accelerator: str | None
    """The GPU's name; ``None`` also if the CPU did the work."""
    platform: str | None
    threads: int | None
    """Number of the engine's threads."""
    load: dict[str, float] | None
    """One-minute load averages ``before`` and ``after``; the benchmark itself makes 1."""


class Row(_Strict):
    """One measured case."""

    case: dict[str, str | int | float | bool]
    """The row's key, such as pair, dtype and side."""
    values: dict[str, str | int | float | bool | list[float] | None]
    """Figures. Times are medians of the repeats unless their names say otherwise; units are in the names."""
    runs: dict[str, list[float]] = Field(default_factory=dict)
    """All repeats of a median, if they were kept."""


class Result(_Strict):
    """The contents of a file in a ``results`` folder."""

    what: str
    when: date | None
    commit: str | None = Field(pattern=r"^[0-9a-f]{7,40}$")
    """Of this repository."""
    hardware: Hardware
    versions: dict[str, str]
    """Of Python and of the relevant packages."""
    settings: dict[str, str | int | float | bool | list[str] | list[int] | list[float] | None]
    """The benchmark's command line and constants."""
    rows: list[Row] = Field(min_length=1)


def load(path: Path) -> Result:
    """Read a result.

    Raises:
        ValueError: It does not follow the schema, or two rows have the same case.
    """
    result = Result.model_validate_json(path.read_bytes())
    cases = [row.case for row in result.rows]
    if repeated := [case for index, case in enumerate(cases) if case in cases[:index]]:
        raise ValueError(f"{path.name} has several rows of the case {repeated[0]}.")
    return result


def text(result: Result) -> str:
    """The JSON of a result, one line per row."""
    data = result.model_dump(mode="json", exclude_defaults=True)
    head = [f' "{name}": {json.dumps(value)}' for name, value in data.items() if name != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    return "{\n" + ",\n".join(head) + f',\n "rows": [\n{rows}\n ]\n}}\n'


def parser(doc: str) -> argparse.ArgumentParser:
    """The command line of a benchmark, with the options that `Recorder` reads."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = "write results/NAME[_HARDWARE].json after each row"
    made.add_argument("--save", nargs="?", const="", metavar="HARDWARE", help=written)
    made.add_argument("--keep", action="store_true", help="keep the rows that are already in the file")
    return made


class Recorder:
    """Collects the rows of one run of a benchmark, prints them as they come, and writes them with ``--save``.

    Args:
        script: The benchmark's ``__file__``.
        doc: Its docstring, whose first sentence says what is measured.
        given: Its parsed command line, from `parser`.
        packages: Distributions whose versions to record, besides polydraft.
        accelerator: The GPU's name, if one does the work.
        threads: Number of the engine's threads.
        constants: Settings that are not on the command line.
        versions: Versions of components that are not installed distributions.
    """

    def __init__(
        self,
        script: str,
        doc: str,
        given: argparse.Namespace,
        *,
        packages: Iterable[str] = (),
        accelerator: str | None = None,
        threads: int | None = None,
        constants: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        from polydraft.hardware import processor

        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        found = {name: _version(name) for name in ("polydraft", *packages)}
        own = {name: value for name, value in vars(given).items() if name not in ("save", "keep", "folder")}
        self._head: dict[str, Any] = {
            "what": " ".join(doc.partition("\n\n")[0].split()),
            "when": datetime.now(UTC).date(),
            "commit": commit.stdout.strip() or None,
            "versions": {"python": platform.python_version(), **found, **(versions or {})},
            "settings": {**own, **(constants or {})},
        }
        self._hardware: dict[str, Any] = {
            "processor": processor() or None,
            "cores": os.cpu_count(),
            "accelerator": accelerator,
            "platform": f"{platform.system()} {platform.machine()}",
            "threads": threads,
        }
        self._load = {"before": round(os.getloadavg()[0], 2)}
        self._rows: list[Row] = []
        self._path: Path | None = None
        if given.save is not None:
            name = "_".join(filter(None, (Path(script).stem, given.save)))
            self._path = Path(script).parent / "results" / f"{name}.json"
        if given.keep and self._path and self._path.exists():
            kept = load(self._path)
            if any(getattr(kept, name) != self._head[name] for name in ("commit", "versions")):
                raise SystemExit(f"{self._path} is of another commit or other versions; measure all of it again.")
            self._rows = list(kept.rows)

    def has(self, **case: str | float) -> bool:
        """Whether there is a row with these items in its case."""
        return any(case.items() <= row.case.items() for row in self._rows)

    def row(
        self, case: dict[str, Any], values: Mapping[str, Any], runs: Mapping[str, Iterable[float]] | None = None
    ) -> None:
        """Add a row, replacing one of the same case. The medians of ``runs`` become values of the same names."""
        every = {name: [round(value, 6) for value in found] for name, found in (runs or {}).items()}
        medians = {name: round(statistics.median(found), 4) for name, found in every.items()}
        row = Row(case=case, values={**medians, **values}, runs=every)
        print(json.dumps({**row.case, **row.values}), flush=True)
        self._rows = [*(other for other in self._rows if other.case != case), row]
        if self._path:
            load_now = {**self._load, "after": round(os.getloadavg()[0], 2)}
            result = Result(**self._head, hardware=Hardware(**self._hardware, load=load_now), rows=self._rows)
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_text(text(result), encoding="utf-8")


def in_turn(sides: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Run all sides in turn, ``repeats`` times, after a warm-up round whose results are dropped."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            outcome = run()
            if repeat:
                found[name].append(outcome)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def files() -> list[Path]:
    """All stored results."""
    return sorted(path for pattern in ("*", "plugins/*") for path in ROOT.glob(f"{pattern}/benchmarks/results/*"))


def table(
    file: str,
    down: list[str],
    values: dict[str, str],
    across: list[str] | None = None,
    where: dict[str, Any] | None = None,
) -> str:
    """A Markdown table of one result, and a line on its conditions."""
    result = load(ROOT / file)
    lines: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    columns: list[tuple[str, ...]] = []
    for row in result.rows:
        if not (where or {}).items() <= row.case.items() or not {*down, *(across or ())} <= {*row.case}:
            continue
        line = lines.setdefault(tuple(str(row.case[name]) for name in down), {})
        for name, form in values.items():
            if row.values.get(name) is not None:
                column = (*(str(row.case[key]) for key in across or ()), *([name] if len(values) > 1 else ()))
                line[column] = _shown(row.values[name], form)
                columns += [column] if column not in columns else []
    head = [*down, *(": ".join(column) for column in columns)]
    rows = [[*key, *(line.get(column, "-") for column in columns)] for key, line in lines.items()]
    cells = [[name.replace("_", " ") for name in head], ["---"] * len(head), *rows]
    shown = "".join(f"| {' | '.join(row)} |\n" for row in cells)
    only = f"Shown: {next(iter(values)).replace('_', ' ')}. " if across and len(values) == 1 else ""
    return f"\n{shown}\n{only}{_conditions(result)} [{Path(file).name}](../{file}).\n\n"


def _shown(value: Any, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(format(item, form) for item in value)
    return format(value, form)


def _conditions(result: Result) -> str:
    """Date, hardware, versions and settings, as far as they are known."""
    hardware = result.hardware
    parts: dict[str, Any] = {
        "": hardware.accelerator or hardware.processor or hardware.platform,
        "cores": hardware.cores,
        "threads": hardware.threads,
        **result.versions,
        **result.settings,
        "commit": result.commit,
        "measured": result.when,
    }
    named = ((name.replace("_", " "), value) for name, value in parts.items() if value not in (None, "", []))
    return ", ".join(f"{name} {_shown(value, '')}".strip() for name, value in named) + "."


def page(old: str) -> str:
    """The page with its tables filled.

    Raises:
        SystemExit: A stored result is not in any table.
    """
    specs = [json.loads(found) for _, found, _ in _TABLE.findall(old)]
    missing = {path.relative_to(ROOT).as_posix() for path in files()} - {spec["file"] for spec in specs}
    if missing:
        raise SystemExit(f"{PAGE.name} has no table of {', '.join(sorted(missing))}.")
    return _TABLE.sub(lambda found: f"{found[1]}{table(**json.loads(found[2]))}{found[3]}", old)


def update(page: Path, text: str, complaint: str) -> int:
    """Write a page; with ``--check`` on the command line compare only, and return 1 if it differs."""
    if text == page.read_text(encoding="utf-8"):
        return 0
    if "--check" in sys.argv[1:]:
        print(complaint, file=sys.stderr)
        return 1
    page.write_text(text, encoding="utf-8")
    return 0


def main() -> int:
    """Fill the tables of the page, or with ``--check`` compare them."""
    text = page(PAGE.read_text(encoding="utf-8"))
    return update(PAGE, text, f"{PAGE.name} does not match the results: run `python ci/benchmarks.py`.")


if __name__ == "__main__":
    sys.exit(main())
