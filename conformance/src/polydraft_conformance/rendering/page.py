"""One self-contained HTML page for one or several reports: no external scripts, fonts or pictures."""

from __future__ import annotations

from collections import Counter
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from polydraft.verification import VERDICTS

from polydraft_conformance.rendering.causes import causes
from polydraft_conformance.rendering.markdown import first_line
from polydraft_conformance.rendering.matrix import Cell, cell, ordered_checks
from polydraft_conformance.rendering.plot import acceptance_plot, curves
from polydraft_conformance.rendering.reading import label
from polydraft_conformance.rendering.statuses import (
    counted,
    look_of,
    rank_of,
    said_of_a_run,
    said_of_products,
    worst_first,
)
from polydraft_conformance.rows import STATUSES, case_of_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["to_page"]

Data = "Mapping[str, Any]"

_LEFT_OUT = {"not-claimed", "not-applicable"}
_QUIET = {"pass", "cannot-install", "protocol", *_LEFT_OUT}
"""Statuses without evidence: the matrix says all."""
_EXPLAINED = {"proves": "Proves", "failure": "A failure means", "look": "Look at"}
_MOST_CAUSES = 6
"""Causes that a backend's card names; the evidence holds all."""


def to_page(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        reports: JSON reports, in the order of the columns.
    """
    css = resources.files("polydraft_conformance").joinpath("data/page.css").read_text(encoding="utf-8")
    names = ", ".join(dict.fromkeys(data["backend"]["name"] for data in reports))
    sections = {
        "backends": [
            "<section id=backends><h2>Backends</h2><div class=cards>",
            *(_card(number, data) for number, data in enumerate(reports)),
            "</div></section>",
        ],
        "checks": _matrix(reports),
        "acceptance": _acceptance(reports),
        "evidence": _evidence(reports),
    }
    body = [
        "<header>",
        "<h1>polydraft conformance</h1>",
        f"<p class=lead>{_lead(reports)}</p>",
        "<nav aria-label=Sections>",
        *(f"<a href=#{name}>{name.capitalize()}</a>" for name, lines in sections.items() if lines),
        "</nav></header>",
        "<main>",
        *(line for lines in sections.values() for line in lines),
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
    if len(reports) == 1:
        _, one, _ = said_of_a_run(reports[0]["status"])
        return f"<b>{escape(reports[0]['backend']['name'])}</b> {one}. {_promise()}"
    statuses = Counter(data["status"] for data in reports)
    order = [status for status in ("pass", "fail", "incomplete", "protocol", "cannot-install") if statuses[status]]
    parts = [
        f"<b>{statuses[status]}</b> {said_of_a_run(status)[1 if statuses[status] == 1 else 2]}"
        for status in dict.fromkeys([*order, *statuses])
    ]
    return f"Of {len(reports)} runs, {', '.join(parts)}. {_promise()}"


def _promise() -> str:
    return (
        "Speculation must not change the output: every output with speculation was compared with plain decoding on the "
        "same engine, token by token."
    )


def _mark(status: str) -> str:
    """A status's mark; readers that do not see it are told the status in words next to it."""
    look = look_of(status)
    return f"<span class='mark {look.tone}' aria-hidden=true>{look.mark}</span>"


def _chip(count: int, status: str) -> str:
    return f"<span class='chip {look_of(status).tone}'>{escape(counted(count, status))}</span>"


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
        "Seed": "" if options.get("seed") is None else str(options["seed"]),
    }
    lines = [
        f'<article class="card {_tone_of_run(data)}" id=backend-{number}>',
        f"<h3>{escape(backend['name'])} {_badge(data)}</h3>",
    ]
    if data["status"] == "incomplete":
        lines.append(
            f"<p>The run ended early: {len(data['checks'])} of {data['planned']} were run. "
            "The others prove nothing.</p>"
        )
    if not data["availability"]["usable"]:
        why = f"{data['availability']['reason']} {data['availability']['remedy']}".strip()
        lines.append(f"<p>{escape(why)}</p>")
    else:
        lines.append(_bar(data))
        lines.append(f"<p class=chips>{''.join(_chip(count, status) for status, count in _summary(data))}</p>")
        lines.append(_verdicts(data.get("verdicts", {})))
        if said := said_of_products(data["checks"]):
            lines.append(f"<p class=note>{escape(said)}</p>")
        lines.append(_causes(number, data))
    lines.append("<dl>")
    lines += [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value]
    lines.append("</dl></article>")
    return "".join(lines)


def _summary(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Statuses with their numbers of rows, the worst first."""
    found = {status: count for status, count in data["summary"].items() if count}
    return [(status, found[status]) for status in worst_first(found)]


def _bar(data: Mapping[str, Any]) -> str:
    """The rows by status, as a bar. Of a backend that fails, nothing is green."""
    parts = "".join(
        f'<i class={look_of(status).tone} style="flex-grow:{count}"></i>'
        for status, count in _summary(data)
        if status not in _LEFT_OUT
    )
    return f"<div class=bar aria-hidden=true>{parts}</div>"


def _verdicts(verdicts: Mapping[str, int]) -> str:
    """The verdicts on compared outputs, counted."""
    if not sum(verdicts.values()):
        return ""
    counts = "".join(
        f'<span class="verdict {name.lower()}{"" if verdicts.get(name) else " none"}"><b>{verdicts.get(name, 0)}</b> '
        f"{name.lower().replace('_', ' ')}</span>"
        for name in VERDICTS
    )
    return f"<p class=verdicts><span>outputs:</span> {counts}</p>"


def _causes(number: int, data: Mapping[str, Any]) -> str:
    """What failed, by cause, with links to the evidence."""
    found = causes(data["checks"])
    items = "".join(
        f"<li><a href=#{_anchor(number, cause.check)}><code>{escape(cause.check)}</code></a> "
        f"{escape(first_line(cause.reason))}</li>"
        for cause in found[:_MOST_CAUSES]
    )
    if len(found) > _MOST_CAUSES:
        items += f"<li>and {len(found) - _MOST_CAUSES} more</li>"
    return f"<ul class=causes>{items}</ul>" if items else ""


def _matrix(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Checks by backends."""
    statements: dict[str, str] = {}
    explanations: dict[str, Mapping[str, str]] = {}
    for data in reports:
        statements |= data.get("statements", {})
        explanations |= data.get("explanations", {})
    heads = "".join(
        f"<th scope=col><a href=#backend-{number}>{escape(data['backend']['name'])}</a>"
        f"<small>{escape(', '.join(label(data).split(', ')[1:]))}</small></th>"
        for number, data in enumerate(reports)
    )
    lines = [
        "<section id=checks><h2>Checks</h2>",
        "<p class=note>A cell counts the cases of a check: targets, drafter kinds and numbers of draft tokens. "
        f"{_legend()}</p>",
        "<div class=scroll tabindex=0 role=region aria-label='Checks by backends'>"
        f"<table class=matrix><thead><tr><th scope=col>check</th>{heads}</tr></thead><tbody>",
    ]
    group = None
    for name, check in ordered_checks(reports):
        if name != group:
            title = f"<span>{escape(_spaced(name))}</span>"
            lines.append(f"<tr class=group><th colspan={len(reports) + 1} scope=rowgroup>{title}</th></tr>")
            group = name
        cells = "".join(
            _cell(number, data, [row for row in data["checks"] if (row["group"], row["check"]) == (name, check)])
            for number, data in enumerate(reports)
        )
        head = _check_head(check, statements.get(check, ""), explanations.get(check, {}), _reasons(reports, check))
        lines.append(f"<tr><th scope=row>{head}</th>{cells}</tr>")
    return [*lines, "</tbody></table></div></section>"]


def _check_head(check: str, statement: str, explanation: Mapping[str, str], reasons: Sequence[tuple[str, str]]) -> str:
    """A check's name and statement; they unfold to what it proves, what a failure means, and where to look."""
    name = f"<code>{escape(check)}</code><small>{_prose(statement)}</small>"
    facts = [
        f"<dt>{title}</dt><dd>{_prose(explanation[key])}</dd>"
        for key, title in _EXPLAINED.items()
        if key in explanation
    ]
    facts += [f"<dt>{escape(backend)}</dt><dd>{_prose(reason)}</dd>" for backend, reason in reasons]
    return f"<details class=about><summary>{name}</summary><dl>{''.join(facts)}</dl></details>" if facts else name


def _reasons(reports: Sequence[Mapping[str, Any]], check: str) -> list[tuple[str, str]]:
    """Why a check was left out, by backend: the cells have no room for it."""
    found: dict[tuple[str, str], None] = {}
    for data in reports:
        for row in data["checks"]:
            if row["check"] == check and row["status"] in _LEFT_OUT:
                found[data["backend"]["name"], first_line(row["reason"])] = None
    return list(found)


def _prose(text: str) -> str:
    """Text of a docstring: names in code marks are set as code."""
    parts = escape(" ".join(text.split())).replace("``", "`").split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _legend() -> str:
    return (
        " ".join(f"<span class=key>{_mark(status)} {look_of(status).one}</span>" for status in STATUSES)
        + " <span class=key><span class=tie>≈</span> near ties among them</span>"
    )


def _cell(number: int, data: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    found = cell(rows)
    if not found.total:
        return "<td></td>"
    worst, tone = found.worst, look_of(found.worst).tone
    count = found.counts.get(worst, 0)
    said = ", ".join(counted(number, status) for status, number in found.counts.items() if number)
    text = f"{_mark(worst)} {count if count == found.total else _share(found, count)}"
    if found.near_ties:
        text += f" <span class=tie>≈{found.near_ties}</span>"
        said += f", {found.near_ties} near {'tie' if found.near_ties == 1 else 'ties'} among them"
    text = f"<span aria-hidden=true>{text}</span><span class=unseen>{escape(said)}</span>"
    if worst not in _QUIET or found.near_ties:
        text = f"<a href=#{_anchor(number, rows[0]['check'])}>{text}</a>"
    return f'<td class={tone} title="{escape(said, quote=True)}">{text}</td>'


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
    head = "".join(f"<th scope=col>k={k}</th>" for k in ks)
    rows = "".join(
        f"<tr><th scope=row><span class='kind {escape(kind, quote=True)}'>{escape(kind)}</span></th>"
        + "".join(f"<td>{values[k]:.2f}</td>" if k in values else "<td></td>" for k in ks)
        + "</tr>"
        for kind, values in found.items()
    )
    return f"<table class=lengths><tr><th scope=col>tokens per round</th>{head}</tr>{rows}</table>"


def _evidence(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything that did not simply pass, expandable."""
    lines = ["<section id=evidence><h2>Evidence</h2>"]
    for number, data in enumerate(reports):
        blocks: list[tuple[int, str]] = []
        for _, check in ordered_checks([data]):
            rows = [row for row in data["checks"] if row["check"] == check]
            shown = [row for row in rows if row["status"] not in _QUIET]
            ties = [(row, tie) for row in rows for tie in _near_ties(row)]
            if shown or ties:
                rank = min((rank_of(row["status"]) for row in shown), default=len(STATUSES))
                blocks.append((rank, _check_block(_anchor(number, check), check, shown, ties)))
        measured = _measurements(data)
        if blocks or measured:
            sorted_blocks = [block for _, block in sorted(blocks, key=lambda block: block[0])]
            lines += [f"<h3>{escape(label(data))}</h3>", *sorted_blocks, measured]
    return [*lines, "</section>"] if len(lines) > 1 else []


def _check_block(
    anchor: str,
    check: str,
    shown: list[Mapping[str, Any]],
    ties: list[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> str:
    counts = Counter(row["status"] for row in shown)
    badges = "".join(f" {_chip(count, status)}" for status, count in counts.items())
    if ties:
        badges += f" <span class='chip warn'>{len(ties)} near {'tie' if len(ties) == 1 else 'ties'}</span>"
    opened = " open" if counts["fail"] else ""
    parts = [f"<details class=check id={anchor}{opened}><summary><code>{escape(check)}</code>{badges}</summary>"]
    for row in shown:
        head, _, rest = str(row["reason"]).partition("\n")
        word = f"{_mark(row['status'])}<span class=unseen>{look_of(row['status']).one}: </span>"
        said = f"{word} <b>{escape(case_of_row(row))}</b> {escape(head)}"
        more = f"<pre>{escape(rest)}</pre>"
        parts.append(
            f"<details class=row><summary>{said}</summary>{more}</details>" if rest else f"<p class=row>{said}</p>"
        )
    for row, tie in ties:
        parts.append(
            f"<details class=row><summary><span class=tie>≈</span> <b>{escape(case_of_row(row))}</b> output token "
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
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items() if value
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
                f"<tr><th scope=row><code>{escape(row['check'])}</code></th>"
                f"<td>{escape(case_of_row(row))}</td><td>{escape(said)}</td></tr>"
            )
    if not rows:
        return ""
    return (
        f"<details class=check><summary>Measurements <span class=chip>{len(rows)}</span></summary>"
        "<div class=scroll tabindex=0 role=region aria-label=Measurements>"
        f"<table class=facts>{''.join(rows)}</table></div></details>"
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


def _tone_of_run(data: Mapping[str, Any]) -> str:
    return {"pass": "good", "fail": "bad", "incomplete": "warn"}.get(data["status"], "off")


def _badge(data: Mapping[str, Any]) -> str:
    word = {"pass": "conforms", "incomplete": "incomplete"}.get(data["status"], said_of_a_run(data["status"])[0])
    return f"<span class='badge {_tone_of_run(data)}'>{word}</span>"


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


def _anchor(number: int, check: str) -> str:
    return escape(f"evidence-{number}-{check}", quote=True)


def _spaced(name: str) -> str:
    return str(name).replace("_", " ")
