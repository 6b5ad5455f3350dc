"""What is said before a run and after it: one line for each check, failures by cause, the result, and how to go on."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft_conformance.rendering.causes import causes
from polydraft_conformance.rendering.matrix import ordered_checks
from polydraft_conformance.rendering.statuses import (
    Tone,
    counted_by_status,
    look_of,
    said_of_a_run,
    said_of_products,
    worst_first,
)
from polydraft_conformance.rendering.terminal import Line, clock
from polydraft_conformance.rows import followed
from polydraft_conformance.suitability import said_of_models

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from polydraft_conformance.rendering.causes import Cause
    from polydraft_conformance.rendering.terminal import Place, Style

__all__ = ["ending", "failures", "heading", "repeat_command", "result", "table"]


def heading(data: Mapping[str, Any], planned: Iterable[Place]) -> Iterator[Line]:
    """What is going to run.

    Args:
        data: The JSON report, without rows.
        planned: The items.
    """
    places = list(planned)
    options = data["options"]
    kinds: dict[str, list[str]] = {}
    for place in places:
        if place.target and place.kind not in kinds.setdefault(place.target, []):
            kinds[place.target].append(str(place.kind))
    ks = sorted({place.k for place in places if place.k is not None})
    backend = data["backend"]
    engine = " ".join(part for part in (backend["engine"], backend["engine_version"]) if part)
    facts = [
        f"{options['dtype']} on {options['device']}",
        "quick" if options["quick"] else "full",
        "" if (seed := options.get("seed")) is None else f"seed {seed}",
    ]
    yield [(f"polydraft conformance of {backend['name']} ({engine}): {', '.join(filter(None, facts))}", None)]
    checks, cases = _plural(len({place.check for place in places}), "check"), _plural(len(places), "case")
    yield [(f"{checks}, {cases}{f', k {_joined(ks)}' if ks else ''}", None)]
    for target, found in kinds.items():
        yield [(f"  {target}: {', '.join(found)}", "off")]


def table(rows: Sequence[Mapping[str, Any]], style: Style) -> Iterator[Line]:
    """One line for each check, by group; with -q one for each group, with -qq none.

    Args:
        rows: Of a JSON report.
        style: Verbosity and characters.
    """
    if style.verbosity < -1:
        return
    by_check: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_check.setdefault((row["group"], row["check"]), []).append(row)
    names = [key for key in ordered_checks([{"checks": rows}]) if key in by_check]
    if style.verbosity == -1:
        for group in dict.fromkeys(group for group, _ in names):
            mine = [row for (of, _), found in by_check.items() if of == group for row in found]
            yield _table_line(style, "", _words(group), mine, 18, 40)
        return
    width = max((len(check) for _, check in names), default=0)
    counts_width = min(40, max((len(_counts(mine)) for mine in by_check.values()), default=0))
    last = None
    for group, check in names:
        if group != last:
            yield [(_words(group), None)]
            last = group
        mine = by_check[group, check]
        yield _table_line(style, "  ", check, mine, width, counts_width)
        found = causes(mine)
        for cause in found[:1]:
            more = f"; {len(found) - 1} more of its reasons are below" if len(found) > 1 else ""
            yield [(f"      {_first(cause.rows[0])} ({_listed(cause.cases, 1) or 'no case'}{more})", "bad")]


def _table_line(
    style: Style, indent: str, name: str, rows: list[Mapping[str, Any]], width: int, counts_width: int
) -> Line:
    status = worst_first(row["status"] for row in rows)[0]
    tone = look_of(status).tone
    counts = _counts(rows)
    spent = sum(row["seconds"] for row in rows)
    parts: list[tuple[str, Tone | None]] = [
        (f"{indent}{style.mark(status)} ", tone),
        (f"{name:{width}}  ", "bad" if tone == "bad" else None),
        (f"{counts:{counts_width}}", tone if tone != "good" else None),
        (f" {spent:7.1f} s", "off"),
    ]
    said = dict.fromkeys(_first(row) for row in rows if row["status"] == status and row["reason"])
    if status == "follows":
        said = dict.fromkeys(f"from {followed(row['reason'])}" for row in rows if row["status"] == "follows")
    if status not in {"pass", "fail"} and said:
        parts.append((f"  {'; '.join(said)}", "off"))
    return parts


def _counts(rows: list[Mapping[str, Any]]) -> str:
    """``12 of 12 passed``, ``2 of 12 failed, 10 passed``."""
    counts = Counter(row["status"] for row in rows)
    first, *rest = worst_first(counts)
    parts = [f"{counts[first]} of {len(rows)} {look_of(first).past}"]
    return ", ".join([*parts, *(f"{counts[status]} {look_of(status).past}" for status in rest)])


def failures(
    rows: Sequence[Mapping[str, Any]], style: Style, explained: Mapping[str, Mapping[str, str]]
) -> Iterator[Line]:
    """Each cause of failures once: the reason with its evidence, the cases, what follows from it, where to look.

    Args:
        rows: Of a JSON report.
        style: Verbosity and characters.
        explained: What is known of checks, by name: ``failure`` and ``look``.
    """
    for cause in causes(rows):
        yield from _failure(cause, style, explained.get(cause.check, {}))
        yield [("", None)]


def _failure(cause: Cause, style: Style, explained: Mapping[str, str]) -> Iterator[Line]:
    first, _, evidence = cause.reason.partition("\n")
    yield [(f"{style.mark('fail')} {cause.check}: {first}", "bad")]
    for line in textwrap.dedent(evidence).splitlines():
        yield [(f"    {line}", None)]
    cases = [case for case in cause.cases if case]
    if cases:
        head = f"  failed on {_listed(cases, 4)}"
        yield [(head if len(cases) == 1 else f"{head}; the evidence is the first one's", "off")]
    if cause.followers:
        checks = list(cause.followers)
        yield [(f"  {cause.followers.total()} more follow from it: {_listed(checks, 3, ', ', ' checks')}", "off")]
    for name, title in (("failure", "a failure means"), ("look", "look at")):
        if text := explained.get(name, ""):
            yield [(f"  {title}: {' '.join(text.split())}", "off")]


def result(data: Mapping[str, Any], *, seconds: float, planned: int) -> Iterator[Line]:
    """The counts and the verdicts of a run.

    Args:
        data: The JSON report.
        seconds: How long the run took.
        planned: Number of rows that a complete run has; 0 if unknown.
    """
    rows = data["checks"]
    status = data["status"]
    tone: Tone = "good" if status == "pass" else "bad" if status == "fail" else "warn"
    said = f"{data['backend']['name']} {said_of_a_run(status)[0]}: {counted_by_status(rows)}"
    yield [(said, tone), (f", in {clock(seconds)}", None)]
    if len(rows) < planned:
        yield [(f"The run ended early: {len(rows)} of {planned} were run. The others prove nothing.", "warn")]
    if not data["availability"]["usable"]:
        yield [(f"{data['availability']['reason']} {data['availability']['remedy']}".strip(), "warn")]
    verdicts = data.get("verdicts", {})
    if sum(verdicts.values()):
        said = ", ".join(f"{count} {_words(name.lower())}" for name, count in verdicts.items())
        said = said.replace("near tie", "near tie" if verdicts.get("NEAR_TIE") == 1 else "near ties")
        yield [(f"outputs compared with plain decoding: {said}", None)]
    if precisions := said_of_products(rows):
        yield [(precisions, "warn")]


def ending(
    data: Mapping[str, Any],
    *,
    seconds: float,
    planned: int,
    arguments: Sequence[str],
    page: Path | None,
    has_tracebacks: bool,
) -> Iterator[Line]:
    """The result, the command that repeats the run, and where its report is.

    Args:
        data: The JSON report.
        seconds: How long the run took.
        planned: Number of rows that a complete run has; 0 if unknown.
        arguments: pytest's.
        page: The HTML report; None if none was written.
        has_tracebacks: Whether pytest has shown tracebacks and captured output.
    """
    yield from result(data, seconds=seconds, planned=planned)
    for line in said_of_models(data["checks"]):
        yield [(line, "off")]
    seed = data["options"].get("seed")
    yield [(f"repeat it{f' (seed {seed})' if seed is not None else ''}: {repeat_command(arguments, seed)}", None)]
    if data["status"] == "fail" and not has_tracebacks:
        yield [("tracebacks, and what the backend printed: add -v; one check alone: add -k CHECK", "off")]
    if page is not None:
        yield [(f"report: {page.resolve()}", None)]
    else:
        yield [("a page with the evidence for every check: add --polydraft-report DIR", "off")]


def repeat_command(arguments: Sequence[str], seed: int | None) -> str:
    """The command that repeats a run, to be pasted.

    Args:
        arguments: pytest's own.
        seed: The run's, where it has one.
    """
    found = shutil.which("pytest")
    beside = found is not None and Path(found).parent == Path(sys.executable).parent
    given = [str(argument) for argument in arguments]
    if seed is not None and not any(part.startswith("--polydraft-seed") for part in given):
        given.append(f"--polydraft-seed={seed}")
    return shlex.join([*(["pytest"] if beside else [sys.executable, "-m", "pytest"]), *given])


def _first(row: Mapping[str, Any]) -> str:
    return str(row["reason"]).partition("\n")[0]


def _listed(names: Sequence[str], most: int, between: str = "; ", kind: str = "") -> str:
    """The first names, and how many more there are."""
    named = between.join(name for name in names[:most] if name)
    return f"{named} and {len(names) - most} more{kind}" if len(names) > most else named


def _joined(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
