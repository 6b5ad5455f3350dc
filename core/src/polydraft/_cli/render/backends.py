"""The table of ``polydraft backends``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft._cli.render.tables import FittingTable, to_json
from polydraft._flags import in_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from polydraft._plugins import PluginStatus
    from polydraft._registry.describe import BackendDescription

__all__ = ["backend_data", "backends_json", "backends_table", "state_of"]


def state_of(found: BackendDescription) -> str:
    """``usable``, ``usable, with known faults``, or ``not usable``."""
    if not found.state.usable:
        return "not usable"
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
        "engine": record.engine,
        "engine_version": diagnosis.engine_version if diagnosis else None,
        "formats": sorted(record.formats),
        "drafter_kinds": sorted(record.drafter_kinds),
        "problem": found.state.problem,
        "remedy": found.state.remedy,
    }


def backends_json(found: Sequence[BackendDescription], others: Sequence[PluginStatus]) -> str:
    """Backends, and the plugins that bring none because they are broken or disabled."""
    return to_json(
        {
            "backends": [backend_data(backend) for backend in found],
            "plugins": [status.model_dump(mode="json") for status in others],
        }
    )


def backends_table(found: Sequence[BackendDescription], others: Sequence[PluginStatus]) -> RenderableType:
    """One row per backend; then the plugins that are broken or disabled."""
    from rich.console import Group
    from rich.text import Text

    from polydraft._registry.backends import usual_install

    if not found and not others:
        return Text(f"No backend is installed. Install one: {usual_install()}")
    table = FittingTable("backend", "engine", "state", "drafters", "formats", "what it is")
    for backend in found:
        data = backend_data(backend)
        state = data["state"] if data["usable"] else f"not usable: {in_flags(data['problem'])}"
        table.add_row(
            Text(data["name"], style="bold"),
            f"{data['engine']} {data['engine_version'] or ''}".strip(),
            Text(state, style="green" if data["state"] == "usable" else "yellow" if data["usable"] else "red"),
            ", ".join(data["drafter_kinds"]),
            ", ".join(data["formats"]),
            data["summary"],
        )
    for status in others:
        engine = f"{status.distribution or ''} {status.version or ''}".strip()
        table.add_row(
            Text(", ".join(status.backends) or status.name, style="bold"),
            engine,
            Text(f"{status.state}: {status.reason}", style="red" if status.state == "broken" else "dim"),
        )
    return Group(table, Text("\n`polydraft doctor` shows how to fix what is not usable.", style="dim"))
