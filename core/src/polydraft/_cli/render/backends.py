"""The table of ``polydraft backends``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft._cli.render.tables import FittingTable, to_json
from polydraft._flags import in_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from polydraft._discovery.installed import PluginStatus
    from polydraft._registry.backends import KnownBackend
    from polydraft._registry.describe import BackendDescription

__all__ = ["backend_data", "backends_json", "backends_table", "state_of"]


def state_of(found: BackendDescription) -> str:
    """``usable``, ``usable, with known faults``, ``usable if named`` (``auto`` never chooses it), or ``not usable``."""
    if not found.state.usable:
        return "not usable"
    if found.state.only_if_named:
        return "usable if named"
    return "usable, with known faults" if found.state.faults else "usable"


def backend_data(found: BackendDescription) -> dict[str, Any]:
    """Everything known about a backend, ready for JSON."""
    record, diagnosis = found.state.record, found.state.diagnosis
    return {
        "name": record.name,
        "summary": record.summary,
        "state": state_of(found),
        "usable": found.state.usable,
        "plugin": found.plugin.distribution if found.plugin else None,
        "plugin_version": found.plugin.version if found.plugin else None,
        "engine": found.state.distribution,
        "engine_version": diagnosis.engine_version if diagnosis else None,
        "formats": sorted(record.formats),
        "drafter_kinds": sorted(record.drafter_kinds),
        "serves": found.serves,
        "problem": found.state.problem,
        "remedy": found.state.remedy,
    }


def backends_json(
    found: Sequence[BackendDescription], others: Sequence[PluginStatus], missing: Sequence[KnownBackend]
) -> str:
    """Backends, the plugins that bring none because they are broken or disabled, and what is not installed."""
    return to_json(
        {
            "backends": [backend_data(backend) for backend in found],
            "plugins": [status.model_dump(mode="json") for status in others],
            "not_installed": [
                {"name": known.name, "install": known.install, "why_not": known.why_not} for known in missing
            ],
        }
    )


def backends_table(
    found: Sequence[BackendDescription], others: Sequence[PluginStatus], missing: Sequence[KnownBackend]
) -> RenderableType:
    """One row per backend, those that run here first; then broken and disabled plugins, and what is not installed.

    Below, what is missing: the command or step for each.
    """
    from rich.console import Group
    from rich.text import Text

    from polydraft._registry.backends import usual_install

    if not found and not others:
        return Text(f"No backend is installed. Install one: {usual_install()}")
    table = FittingTable("backend", "state", "engine", "drafters", "formats", "server")
    lines: list[str] = []
    for backend in sorted(found, key=lambda one: not one.state.usable):
        data = backend_data(backend)
        table.add_row(
            Text(data["name"], style="bold"),
            Text(data["state"], style="green" if data["state"] == "usable" else "yellow" if data["usable"] else "red"),
            f"{data['engine']} {data['engine_version'] or ''}".strip(),
            ", ".join(data["drafter_kinds"]),
            ", ".join(data["formats"]),
            {True: "yes", False: "no", None: ""}[data["serves"]],
        )
        if data["problem"]:
            lines.append(f"{data['name']}: {in_flags(data['problem'])} {in_flags(data['remedy'])}".strip())
    for status in others:
        name = ", ".join(status.backends) or status.name
        table.add_row(
            Text(name, style="bold"),
            Text(status.state, style="red" if status.state == "broken" else "dim"),
            f"{status.distribution or ''} {status.version or ''}".strip(),
            *("", "", ""),
        )
        lines.append(f"{name}: {status.reason}")
    for known in missing:
        table.add_row(
            Text(known.name, style="bold"),
            Text("not installed", style="dim"),
            *("", "", ", ".join(sorted(known.formats)), ""),
        )
    # Some backends are installed together.
    for how in dict.fromkeys(known.install or known.why_not for known in missing):
        names = ", ".join(known.name for known in missing if how == (known.install or known.why_not))
        install = any(known.install == how for known in missing)
        lines.append(f"{names}: {in_flags(f'`{how}`') if install else how}")
    parts = [Text("\n" + "\n".join(lines))] if lines else []
    note = "\n`polydraft doctor` asks each engine anew, and shows more about each."
    return Group(table, *parts, Text(note, style="dim"))
