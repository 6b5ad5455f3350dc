"""Two reports of one backend compared: what broke, what was mended, what moved. As data, and as text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from polydraft_conformance.rendering.causes import shape_of
from polydraft_conformance.rendering.markdown import first_line
from polydraft_conformance.rendering.reading import ReportError, label
from polydraft_conformance.rendering.statuses import look_of, rank_of, said_of_a_run
from polydraft_conformance.rows import case_of_row, followed

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

__all__ = ["THRESHOLD", "compare", "compare_all", "to_text"]

THRESHOLD = 0.02
"""Acceptance rates that move by less than this are not told."""
_FAILED = frozenset({"fail", "follows"})
_ROUNDING = 1e-12
"""Of differences of rates: a move of just the threshold is told."""
_MOST_CASES = 4
"""Cases that a line names."""
_MOST_NAMES = 12
"""Checks, pairs or k that a line names."""


def compare_all(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], threshold: float = THRESHOLD
) -> dict[str, Any]:
    """Compare reports of one or several backends, JSON-ready.

    Reports belong together where backend, dtype and device are the same, and among several of these where they ran the
    same pairs. Two single reports are compared whatever they are of.

    Args:
        old: JSON reports.
        new: Later ones.
        threshold: Acceptance rates must move by at least this to be told.

    Returns:
        ``broke``, whether anything did; ``reports``, a comparison for each pair of reports; ``gone`` and ``added``, the
        labels of reports that only one side has.

    Raises:
        ReportError: No report of one side belongs to one of the other.
    """
    pairs, gone, added = _matched(old, new)
    if not pairs:
        raise ReportError(
            f"The reports have no backend, dtype and device in common: {_labels(gone)}; and {_labels(added)}. "
            "Name two files to compare them nevertheless."
        )
    compared = [compare(one, other, threshold) for one, other in pairs]
    failing = [label(data) for data in added if data["status"] == "fail"]
    return {
        "broke": bool(failing) or any(found["broke"] or found["cannot_run_any_more"] for found in compared),
        "threshold": threshold,
        "reports": compared,
        "gone": [label(data) for data in gone],
        "added": [label(data) for data in added],
        "added_that_fail": failing,
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float = THRESHOLD) -> dict[str, Any]:
    """Compare two reports, JSON-ready.

    Args:
        old: A JSON report.
        new: A later one.
        threshold: Acceptance rates must move by at least this to be told.

    Returns:
        Rows by what became of them: ``broke`` (it fails, and did not, or was not run), ``mended``,
        ``fails_differently``, ``changed`` (any other change of status); ``still_failing`` counts the rest of those that
        fail. What only one side has (``gone``, ``added``), and what moved (``claims``, ``acceptance``, ``verdicts``,
        ``conditions``).
    """
    before, after = _rows(old), _rows(new)
    found: dict[str, list[dict[str, Any]]] = {"broke": [], "mended": [], "fails_differently": [], "changed": []}
    still = 0
    for key, row in after.items():
        was = before.get(key)
        kind = _kind(was, row)
        if kind is not None:
            found[kind].append({"was": was["status"] if was else None, "row": dict(row)})
        still += was is not None and {was["status"], row["status"]} <= _FAILED and kind is None
    usable = (old["availability"].get("usable", True), new["availability"].get("usable", True))
    return {
        "old": label(old),
        "new": label(new),
        "status": [old["status"], new["status"]],
        "cannot_run_any_more": usable == (True, False),
        "reason": " ".join(filter(None, (new["availability"].get(name) for name in ("reason", "remedy")))),
        **found,
        "still_failing": still,
        "gone": _only(before, after),
        "added": _only(after, before),
        "claims": _claims(old["backend"].get("claims", {}), new["backend"].get("claims", {})),
        "acceptance": _acceptance(old["acceptance"], new["acceptance"], threshold),
        "verdicts": _moved(old.get("verdicts", {}), new.get("verdicts", {})),
        "conditions": _moved(_conditions(old), _conditions(new)),
    }


def to_text(data: Mapping[str, Any]) -> str:
    """A comparison of ``compare_all``, for readers."""
    lines: list[str] = []
    for found in data["reports"]:
        lines += [*_text(found, data["threshold"]), ""]
    for name, said in (("gone", "Only the old reports have"), ("added", "Only the new reports have")):
        if data[name]:
            lines.append(f"{said}: {'; '.join(data[name])}.")
    if data["added_that_fail"]:
        lines.append(f"Of these, {'; '.join(data['added_that_fail'])}: fails.")
    broke = sum(len(found["broke"]) for found in data["reports"])
    mended = sum(len(found["mended"]) for found in data["reports"])
    stopped = sum(found["cannot_run_any_more"] for found in data["reports"])
    if data["broke"]:
        parts = [f"{broke} broke"] if broke else []
        parts += [f"{stopped} cannot run any more"] if stopped else []
        parts += ["a new report fails"] if data["added_that_fail"] else []
        lines.append(f"{', '.join(parts)}; {mended} mended.")
    else:
        lines.append(f"Nothing broke; {mended} mended.")
    return "\n".join(lines)


def _matched(old: Sequence[Any], new: Sequence[Any]) -> tuple[list[tuple[Any, Any]], list[Any], list[Any]]:
    """Reports that belong together, and those of each side that belong to none."""
    if len(old) == len(new) == 1:
        return [(old[0], new[0])], [], []
    pairs, left = [], list(new)
    gone = list(old)
    # The closest match first; what is left may still be of the same backend.
    for key in (_of_same_pairs, label):
        for one in list(gone):
            other = next((data for data in left if key(data) == key(one)), None)
            if other is not None:
                pairs.append((one, other))
                gone.remove(one)
                left.remove(other)
    return sorted(pairs, key=lambda pair: label(pair[0])), gone, left


def _of_same_pairs(data: Mapping[str, Any]) -> Hashable:
    return label(data), frozenset((row["target"], row["kind"]) for row in data["checks"] if row["target"])


def _labels(reports: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(label(data) for data in reports)


def _rows(data: Mapping[str, Any]) -> dict[Hashable, Mapping[str, Any]]:
    """Rows by check and case; where a case has several, the worst."""
    found: dict[Hashable, Mapping[str, Any]] = {}
    for row in sorted(data["checks"], key=lambda row: rank_of(row["status"])):
        found.setdefault(_key(row), row)
    # In the order of the report.
    return {key: found[key] for key in dict.fromkeys(map(_key, data["checks"]))}


def _key(row: Mapping[str, Any]) -> Hashable:
    return (row["check"], row["target"], row["drafter"], row["kind"], row["k"])


def _kind(was: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str | None:
    """What became of a row; None if nothing that is told."""
    fails = row["status"] in _FAILED
    if was is None:
        return "broke" if fails else None
    failed = was["status"] in _FAILED
    if fails and not failed:
        return "broke"
    if failed and row["status"] == "pass":
        return "mended"
    if fails and failed:
        same = was["status"] != row["status"] or shape_of(was["reason"]) == shape_of(row["reason"])
        return None if same else "fails_differently"
    return "changed" if was["status"] != row["status"] else None


def _only(mine: Mapping[Hashable, Mapping[str, Any]], other: Mapping[Hashable, Any]) -> dict[str, Any]:
    """What one report alone has: whole checks, whole pairs, k, and how many rows in all."""

    def names(rows: Iterable[Mapping[str, Any]], what: str) -> set[Any]:
        if what == "pairs":
            return {f"{row['target']}, {row['kind']}" for row in rows if row["target"]}
        return {row[what] for row in rows if row[what] is not None}

    others = list(other.values())
    return {
        "rows": len(mine.keys() - other.keys()),
        "checks": sorted(names(mine.values(), "check") - names(others, "check")),
        "pairs": sorted(names(mine.values(), "pairs") - names(others, "pairs")),
        "k": sorted(names(mine.values(), "k") - names(others, "k")),
    }


def _claims(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Capabilities that differ: what was added to and removed from a set, or the two values."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*old, *new]):
        one, other = old.get(name), new.get(name)
        if isinstance(one, list) and isinstance(other, list):
            added = [value for value in other if value not in one]
            removed = [value for value in one if value not in other]
            if added or removed:
                found[name] = {"added": added, "removed": removed}
        elif one != other:
            found[name] = {"old": one, "new": other}
    return found


def _acceptance(
    old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]], threshold: float
) -> list[dict[str, Any]]:
    """Cases whose acceptance rate moved by the threshold or more, those that fell most first."""
    keys = ("target", "drafter", "kind", "k", "prompts")
    before = {tuple(entry.get(key) for key in keys): entry for entry in old}
    moved = []
    for entry in new:
        was = before.get(tuple(entry.get(key) for key in keys))
        if was is None:
            continue
        rates: list[Any] = [side.get("acceptance_rate") for side in (was, entry)]
        lengths = [side.get("mean_acceptance_length") for side in (was, entry)]
        if None in rates or abs(rates[1] - rates[0]) < threshold - _ROUNDING:
            continue
        case = {key: entry.get(key) for key in keys}
        moved.append({**case, "acceptance_rate": rates, "mean_acceptance_length": lengths})
    return sorted(moved, key=lambda entry: entry["acceptance_rate"][1] - entry["acceptance_rate"][0])


def _conditions(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a result holds for, and what was asked for."""
    found, options = data["environment"], data["options"]
    return {
        "backend": data["backend"]["name"],
        "engine": " ".join(str(data["backend"].get(key) or "") for key in ("engine", "engine_version")).strip(),
        **{f"{name} (version)": number for name, number in found.get("versions", {}).items()},
        "python": f"{found.get('implementation', '')} {found.get('python', '')}".strip(),
        "platform": found.get("platform"),
        "processor": found.get("processor") or found.get("machine"),
        "devices": ", ".join(str(known.get("description") or known.get("name")) for known in found.get("devices", [])),
        **options,
    }


def _moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [old.get(name), new.get(name)] for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)
    }


def _text(found: Mapping[str, Any], threshold: float) -> Iterator[str]:
    name = found["new"] if found["old"] == found["new"] else f"{found['old']} → {found['new']}"
    statuses = [said_of_a_run(status)[0] for status in found["status"]]
    yield f"{name}: {statuses[1] if statuses[0] == statuses[1] else f'{statuses[0]} → {statuses[1]}'}"
    if found["cannot_run_any_more"]:
        yield f"  It cannot run here any more: {found['reason']}"
        yield from _section("Conditions", _moved_text(found["conditions"], str))
        return
    told = False
    for part in (
        _rows_text("Broke", found["broke"]),
        _rows_text("Mended", found["mended"], reasons=False),
        _rows_text("Fails for another reason than before", found["fails_differently"]),
        _rows_text("Changed otherwise", found["changed"]),
        _only_text("Gone", found["gone"]),
        _only_text("New", found["added"]),
        _section("Claims", _claims_text(found["claims"])),
        _section(f"Acceptance rates that moved by {threshold:g} or more", _acceptance_text(found["acceptance"])),
        _section("Verdicts on outputs", _moved_text(found["verdicts"], str.lower)),
        _section("Conditions", _moved_text(found["conditions"], str)),
    ):
        lines = list(part)
        told = told or bool(lines)
        yield from lines
    if found["still_failing"]:
        yield f"  {found['still_failing']} still fail as before."
    if not told:
        yield "  Nothing else moved." if found["still_failing"] else "  Nothing moved."


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    found = list(lines)
    if found:
        yield f"  {title}:"
        yield from (f"    {line}" for line in found)


def _rows_text(title: str, entries: Sequence[Mapping[str, Any]], *, reasons: bool = True) -> Iterator[str]:
    """A line for each check and reason, with its cases; what follows from other failures is counted."""
    following = [entry for entry in entries if entry["row"]["status"] == "follows"]
    groups: dict[Hashable, list[Mapping[str, Any]]] = {}
    for entry in entries:
        row = entry["row"]
        if entry not in following:
            groups.setdefault((row["check"], entry["was"], row["status"], shape_of(row["reason"])), []).append(entry)
    lines = []
    for mine in groups.values():
        row, was = mine[0]["row"], mine[0]["was"]
        cases = [case for entry in mine if (case := case_of_row(entry["row"]))]
        more = f" and {len(cases) - _MOST_CASES} more" if len(cases) > _MOST_CASES else ""
        where = f" ({'; '.join(cases[:_MOST_CASES])}{more})" if cases else ""
        status = row["status"].replace("-", " ")
        change = f"{was.replace('-', ' ')} → {status}" if was else f"{status}, and was not run before"
        lines.append(f"{look_of(row['status']).mark} {row['check']}{where}: {change}")
        if reasons and row["reason"]:
            lines.append(f"    {first_line(row['reason'])}")
    if following:
        causes = Counter(followed(entry["row"]["reason"]) for entry in following)
        named = ", ".join(str(cause) for cause, _ in causes.most_common(3))
        lines.append(f"{look_of('follows').mark} {len(following)} follow from failures of {named}")
    return _section(f"{title} ({len(entries)})", lines)


def _only_text(title: str, found: Mapping[str, Any]) -> Iterator[str]:
    lines = []
    for name in ("checks", "pairs", "k"):
        shown, more = found[name][:_MOST_NAMES], len(found[name]) - _MOST_NAMES
        if shown:
            lines.append(f"{name}: {'; '.join(map(str, shown))}{f'; and {more} more' if more > 0 else ''}")
    if found["rows"]:
        lines.append(f"{found['rows']} results in all")
    return _section(title, lines)


def _claims_text(claims: Mapping[str, Any]) -> Iterator[str]:
    for name, change in claims.items():
        if "added" in change:
            parts = [f"{said} {', '.join(map(str, change[said]))}" for said in ("added", "removed") if change[said]]
            yield f"{name}: {'; '.join(parts)}"
        else:
            yield f"{name}: {_value(change['old'])} → {_value(change['new'])}"


def _acceptance_text(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        old, new = entry["acceptance_rate"]
        lengths = entry["mean_acceptance_length"]
        said = "" if None in lengths else f"; {lengths[0]:.2f} → {lengths[1]:.2f} tokens a round"
        prompts = f" ({entry['prompts']} prompts)" if entry["prompts"] else ""
        yield f"{case_of_row(entry)}{prompts}: {old:.3f} → {new:.3f} ({new - old:+.3f}){said}"


def _moved_text(moved: Mapping[str, Sequence[Any]], named: Any) -> Iterator[str]:
    for name, (old, new) in moved.items():
        yield f"{named(name).replace('_', ' ')}: {_value(old)} → {_value(new)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "all"  # as options of a run take it
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)
