"""One self-contained HTML page for one or several reports: no external scripts, fonts or pictures."""

from __future__ import annotations

from collections import Counter
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from polydraft.verification import VERDICTS

from polydraft_conformance.rendering.markdown import first_line
from polydraft_conformance.rendering.matrix import Cell, cell, label, ordered_checks
from polydraft_conformance.rendering.plot import acceptance_plot, curves

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["to_page"]

Data = "Mapping[str, Any]"

_WORDS = {
    "pass": "passes",
    "fail": "fails",
    "excluded": "excluded",
    "follows": "follows from another failure",
    "not-claimed": "not claimed",
    "not-applicable": "not applicable",
    "unchecked": "not independently checked",
    "cannot-install": "cannot run here",
}
_MANY = {"pass": "pass", "fail": "fail", "follows": "follow from another failure"}
"""The words after a number other than 1, where they differ."""
_MARKS = {
    "pass": "✓",
    "fail": "✗",
    "follows": "↳",
    "excluded": "○",
    "not-claimed": "·",
    "not-applicable": "·",
    "unchecked": "?",
    "cannot-install": "∅",
    "": "",
}


def to_page(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        reports: JSON reports, in the order of the columns.
    """
    css = resources.files("polydraft_conformance").joinpath("data/page.css").read_text(encoding="utf-8")
    names = ", ".join(dict.fromkeys(data["backend"]["name"] for data in reports))
    body = [
        "<header>",
        "<h1>polydraft conformance</h1>",
        f"<p class=lead>{_lead(reports)}</p>",
        "<nav><a href=#backends>Backends</a><a href=#checks>Checks</a><a href=#acceptance>Acceptance</a>"
        "<a href=#evidence>Evidence</a></nav>",
        "</header>",
        "<main>",
        "<section id=backends><h2>Backends</h2><div class=cards>",
        *(_card(number, data) for number, data in enumerate(reports)),
        "</div></section>",
        *_matrix(reports),
        *_acceptance(reports),
        *_evidence(reports),
        "</main>",
        f"<footer>{_footer(reports)}</footer>",
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>polydraft conformance: {escape(names)}</title><style>{css}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _lead(reports: Sequence[Mapping[str, Any]]) -> str:
    """One sentence that summarises the runs."""
    statuses = Counter(data["status"] for data in reports)
    one = {"pass": "conforms", "fail": "fails", "cannot-install": "cannot run where it was tried"}
    many = {"pass": "conform", "fail": "fail", "cannot-install": "cannot run where they were tried"}
    if len(reports) == 1:
        name, status = escape(reports[0]["backend"]["name"]), reports[0]["status"]
        return f"<b>{name}</b> {one[status]}. {_promise()}"
    parts = [
        f"<b>{statuses[status]}</b> {(one if statuses[status] == 1 else many)[status]}"
        for status in one
        if statuses[status]
    ]
    return f"Of {len(reports)} runs, {', '.join(parts)}. {_promise()}"


def _promise() -> str:
    return (
        "Speculation must not change the output: every output with speculation was compared with plain decoding on the "
        "same engine, token by token."
    )


def _counted(count: int, status: str) -> str:
    """``1 fails``, ``2 fail``."""
    return f"{count} {_WORDS[status] if count == 1 else _MANY.get(status, _WORDS[status])}"


def _card(number: int, data: Mapping[str, Any]) -> str:
    """A backend: what ran, on what, and the result."""
    backend, found, options = data["backend"], data["environment"], data["options"]
    engine = " ".join(part for part in (backend["engine"], backend["engine_version"]) if part)
    facts: dict[str, str] = {
        "Engine": engine,
        "Precision": ", ".join(part for part in (options.get("dtype"), options.get("device")) if part),
        "Hardware": _hardware(data),
        "Python": f"{found['implementation']} {found['python']}, {found['platform']}",
        "Versions": ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        "Run": "quick" if options.get("quick") else "full" if options else "",
    }
    lines = [
        f'<article class="card {data["status"]}" id=backend-{number}>',
        f"<h3>{escape(backend['name'])} {_badge(data['status'])}</h3>",
    ]
    if not data["availability"]["usable"]:
        why = f"{data['availability']['reason']} {data['availability']['remedy']}".strip()
        lines.append(f"<p>{escape(why)}</p>")
    else:
        lines.append(_verdict_bar(data.get("verdicts", {})))
        counts = "".join(
            f'<span class="chip {status}">{_counted(count, status)}</span>'
            for status, count in data["summary"].items()
            if count
        )
        lines.append(f"<p class=chips>{counts}</p>")
    lines.append("<dl>")
    lines += [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value]
    lines.append("</dl></article>")
    return "".join(lines)


def _verdict_bar(verdicts: Mapping[str, int]) -> str:
    """The verdicts on compared outputs: a bar, and the counts."""
    total = sum(verdicts.values())
    if not total:
        return ""
    bars = "".join(
        f'<i class={name.lower()} style="flex-grow:{verdicts[name]}"></i>' for name in VERDICTS if verdicts.get(name)
    )
    counts = "".join(
        f'<span class="verdict {name.lower()}{"" if verdicts.get(name) else " none"}"><b>{verdicts.get(name, 0)}</b> '
        f"{name.lower().replace('_', ' ')}</span>"
        for name in VERDICTS
    )
    return f"<div class=bar>{bars}</div><p class=verdicts>{counts}</p>"


def _matrix(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Checks by backends."""
    statements: dict[str, str] = {}
    for data in reports:
        statements |= data.get("statements", {})
    heads = "".join(
        f"<th scope=col><a href=#backend-{number}>{escape(data['backend']['name'])}</a>"
        f"<small>{escape(', '.join(label(data).split(', ')[1:]))}</small></th>"
        for number, data in enumerate(reports)
    )
    lines = [
        "<section id=checks><h2>Checks</h2>",
        "<p class=note>A cell counts the cases of a check: targets, drafter kinds and numbers of draft tokens. "
        f"{_legend()}</p>",
        f"<div class=scroll><table class=matrix><thead><tr><th scope=col>check</th>{heads}</tr></thead><tbody>",
    ]
    group = None
    for name, check in ordered_checks(reports):
        if name != group:
            lines.append(f"<tr class=group><th colspan={len(reports) + 1} scope=rowgroup>{_spaced(name)}</th></tr>")
            group = name
        cells = "".join(
            _cell(number, data, [row for row in data["checks"] if (row["group"], row["check"]) == (name, check)])
            for number, data in enumerate(reports)
        )
        statement = escape(statements.get(check, "")).replace("``", "")
        lines.append(f"<tr><th scope=row><code>{check}</code><small>{statement}</small></th>{cells}</tr>")
    return [*lines, "</tbody></table></div></section>"]


def _legend() -> str:
    return (
        " ".join(
            f"<span class=key><span class='mark {status}'>{_MARKS[status]}</span> {word}</span>"
            for status, word in _WORDS.items()
        )
        + " <span class=key><span class=tie>≈</span> near ties among them</span>"
    )


def _cell(number: int, data: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    found = cell(rows)
    if not found.total:
        return "<td></td>"
    worst = found.worst
    count = found.counts.get(worst, 0)
    text = (
        f"<span class='mark {worst}'>{_MARKS[worst]}</span> {count if count == found.total else _share(found, count)}"
    )
    if found.near_ties:
        text += f" <span class=tie>≈{found.near_ties}</span>"
    title = ", ".join(f"{_counted(count, status)}" for status, count in found.counts.items() if count)
    if worst in {"fail", "follows", "excluded"} or found.near_ties:
        check = rows[0]["check"]
        text = f"<a href=#{_anchor(number, check)}>{text}</a>"
    elif worst == "not-claimed":
        title += ": " + "; ".join(dict.fromkeys(first_line(row["reason"]) for row in rows))
    return f'<td class="{worst}" title="{escape(title, quote=True)}">{text}</td>'


def _share(found: Cell, count: int) -> str:
    """``3 of 12``; where the rest is only not claimed, ``3``."""
    rest = {status for status, number in found.counts.items() if number} - {found.worst}
    return str(count) if rest == {"not-claimed"} else f"{count} of {found.total}"


def _acceptance(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """A plot for each target, and the mean acceptance lengths."""
    lines = [
        "<section id=acceptance><h2>Acceptance by position</h2>",
        "<p class=note>Share of rounds in which the draft at a position was accepted, on the suite's own prompts, "
        "greedy, at the largest number of draft tokens that was run. <span class='kind mtp'>mtp</span> "
        "<span class='kind draft-model'>draft-model</span> <span class='kind ngram'>ngram</span></p>",
    ]
    figures = []
    for data in reports:
        entries = data.get("acceptance", [])
        for target in dict.fromkeys(entry["target"] for entry in entries):
            mine = [entry for entry in entries if entry["target"] == target]
            found = curves(mine)
            if found:
                figures.append(
                    f"<figure><figcaption>{escape(target)}<small>{escape(label(data))}</small></figcaption>"
                    f"{acceptance_plot(f'{label(data)}: {target}', found)}{_lengths(mine)}</figure>"
                )
    return [*lines, "<div class=plots>", *figures, "</div></section>"] if figures else []


def _lengths(entries: Iterable[Mapping[str, Any]]) -> str:
    """Mean acceptance length by drafter kind, at the smallest and the largest k."""
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        value = entry.get("mean_acceptance_length")
        if entry.get("prompts") == "window" and value is not None:
            found.setdefault(entry["kind"], {}).setdefault(entry["k"], value)
    if not found:
        return ""
    ks = sorted({k for values in found.values() for k in (min(values), max(values))})
    head = "".join(f"<th>k={k}</th>" for k in ks)
    rows = "".join(
        f"<tr><th><span class='kind {kind}'>{kind}</span></th>"
        + "".join(f"<td>{values[k]:.2f}</td>" if k in values else "<td></td>" for k in ks)
        + "</tr>"
        for kind, values in found.items()
    )
    return f"<table class=lengths><tr><th>tokens per round</th>{head}</tr>{rows}</table>"


def _evidence(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything that did not simply pass, expandable."""
    lines = ["<section id=evidence><h2>Evidence</h2>"]
    for number, data in enumerate(reports):
        blocks: list[tuple[int, str]] = []
        for _, check in ordered_checks([data]):
            rows = [row for row in data["checks"] if row["check"] == check]
            shown = [row for row in rows if row["status"] in {"fail", "follows", "excluded"}]
            ties = [(row, tie) for row in rows for tie in _near_ties(row)]
            if shown or ties:
                statuses = {row["status"] for row in shown}
                rank = 0 if "fail" in statuses else 1 if "follows" in statuses else 2
                blocks.append((rank, _check_block(_anchor(number, check), check, shown, ties)))
        measured = _measurements(data)
        if blocks or measured:
            sorted_blocks = [block for _, block in sorted(blocks, key=lambda block: block[0])]
            lines += [f"<h3>{escape(label(data))}</h3>", *sorted_blocks, measured]
    return [*lines, "</section>"]


def _check_block(
    anchor: str,
    check: str,
    shown: list[Mapping[str, Any]],
    ties: list[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> str:
    counts = Counter(row["status"] for row in shown)
    badges = "".join(
        f" <span class='chip {status}'>{_counted(count, status)}</span>" for status, count in counts.items()
    )
    if ties:
        badges += f" <span class='chip near_tie'>{len(ties)} near {'tie' if len(ties) == 1 else 'ties'}</span>"
    opened = " open" if counts["fail"] else ""
    parts = [f"<details class=check id={anchor}{opened}><summary><code>{check}</code>{badges}</summary>"]
    for row in shown:
        head, _, rest = str(row["reason"]).partition("\n")
        more = f"<pre>{escape(rest)}</pre>" if rest else ""
        parts.append(
            f"<details class=row><summary><span class='mark {row['status']}'>{_MARKS[row['status']]}</span> "
            f"<b>{escape(_case(row))}</b> {escape(head)}</summary>{more}</details>"
        )
    for row, tie in ties:
        parts.append(
            f"<details class=row><summary><span class=tie>≈</span> <b>{escape(_case(row))}</b> output token "
            f"{tie['position']}: {escape(' or '.join(str(text) for text in tie['texts']))}</summary>"
            f"{_tie_table(tie)}</details>"
        )
    return "".join([*parts, "</details>"])


def _tie_table(tie: Mapping[str, Any]) -> str:
    """The measurements at a near tie."""
    measured = tie.get("tie") or {}
    values = [None if value is None else f"{value:.6g}" for value in measured.get("values", ())]
    control = measured.get("control", ())
    flipped = sum(token == tie["tokens"][1] for token in control)
    margin = tie.get("margin_in_noise")
    facts = {
        "of": tie["of"],
        "tokens": f"{tie['tokens'][0]} {tie['texts'][0]} plainly, {tie['tokens'][1]} {tie['texts'][1]} otherwise",
        f"{measured.get('source', 'values')} in plain decoding": " and ".join(str(value) for value in values),
        "margin": "a filter's edge lies between them"
        if measured.get("cut") or margin is None
        else f"{measured['margin']:.3g} = {margin:.3g} times the noise",
        "numeric noise": "" if measured.get("noise") is None else f"{measured['noise']:.3g}",
        "control without a drafter": f"{flipped} of {len(control)} scorings in blocks choose the other token",
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items() if value
    )
    return f"<table class=facts>{rows}</table>"


def _measurements(data: Mapping[str, Any]) -> str:
    """Numbers that checks measured and no other part shows."""
    rows = []
    for row in data["checks"]:
        numbers = {
            name: value
            for name, value in row["numbers"].items()
            if name not in {"acceptance", "differences", "verdicts"} and value not in ({}, [], None)
        }
        if numbers:
            said = "; ".join(f"{_spaced(name)} {_number(value)}" for name, value in numbers.items())
            rows.append(
                f"<tr><th><code>{row['check']}</code></th><td>{escape(_case(row))}</td><td>{escape(said)}</td></tr>"
            )
    if not rows:
        return ""
    return (
        f"<details class=check><summary>Measurements <span class=chip>{len(rows)}</span></summary>"
        f"<div class=scroll><table class=facts>{''.join(rows)}</table></div></details>"
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_spaced(name)} {_number(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_number(inner) for inner in value) + "]"
    return str(value)


def _near_ties(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [tie for tie in row["numbers"].get("differences", ()) if tie["verdict"] == "NEAR_TIE"]


def _badge(status: str) -> str:
    return (
        f"<span class='badge {status}'>{ {'pass': 'conforms', 'fail': 'fails'}.get(status, 'cannot run here') }</span>"
    )


def _hardware(data: Mapping[str, Any]) -> str:
    """The device's description unless it is a CPU, and the processor."""
    found, device = data["environment"], data["options"].get("device", "cpu")
    described = [
        entry["description"] for entry in found["devices"] if device != "cpu" and entry["name"].startswith(device)
    ]
    return ", ".join([*described, found.get("processor") or found.get("machine", "")])


def _footer(reports: Sequence[Mapping[str, Any]]) -> str:
    versions = {data["environment"]["versions"].get("polydraft-conformance") for data in reports} - {None}
    return (
        f"Made by polydraft-conformance {escape(', '.join(sorted(versions)))} from the JSON reports of its runs. "
        "A result is true of a pair on a backend with these versions, this precision and this hardware."
    )


def _case(row: Mapping[str, Any]) -> str:
    parts = [row["target"], row["kind"], None if row["k"] is None else f"k={row['k']}"]
    return ", ".join(str(part) for part in parts if part)


def _anchor(number: int, check: str) -> str:
    return f"evidence-{number}-{check}"


def _spaced(name: str) -> str:
    return str(name).replace("_", " ")
