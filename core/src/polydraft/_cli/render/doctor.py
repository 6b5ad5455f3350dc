"""The report of ``polydraft doctor``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from polydraft._cli.render.backends import backend_data, state_of
from polydraft._cli.render.tables import gigabytes, to_json
from polydraft._flags import in_flags
from polydraft._registry.backends import usual_install

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from polydraft._discovery.installed import PluginStatus
    from polydraft._environments.store import Broken
    from polydraft._registry.backends import KnownBackend
    from polydraft._registry.describe import BackendDescription

__all__ = ["Findings", "Machine", "doctor_json", "doctor_report"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where this runs."""

    polydraft: str
    contract_version: int
    python: str
    executable: str
    system: str
    cpus: int
    memory_bytes: int | None
    free_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything in the report."""

    machine: Machine
    backends: list[BackendDescription]
    missing: list[KnownBackend]
    """Backends that are known by name, but not installed."""
    plugins: list[PluginStatus]
    """Plugins that are broken or disabled."""
    environments: list[Broken]
    """Environments of engines that cannot be used."""
    notes: list[str]

    @property
    def usable(self) -> bool:
        """Whether at least one backend can run."""
        return any(found.state.usable for found in self.backends)


def doctor_json(findings: Findings) -> str:
    """One object: ``machine``, ``backends`` (installed or not), ``usable`` (whether one is), and what is broken."""
    return to_json(
        {
            "usable": findings.usable,
            "machine": asdict(findings.machine),
            "backends": [*map(_installed, findings.backends), *map(_missing, findings.missing)],
            "plugins": [status.model_dump(mode="json") for status in findings.plugins],
            "environments": [broken.model_dump(mode="json") for broken in findings.environments],
            "notes": list(findings.notes),
        }
    )


def _installed(found: BackendDescription) -> dict[str, Any]:
    diagnosis = found.state.diagnosis
    return {
        **backend_data(found),
        "installed": True,
        "environment": str(found.folder) if found.folder is not None else None,
        "devices": [device.model_dump(mode="json") for device in diagnosis.devices] if diagnosis else [],
        "notes": list(diagnosis.notes) if diagnosis else [],
        "faults": [
            {**fault.model_dump(mode="json"), "installed_version": version} for fault, version in found.state.faults
        ],
    }


def _missing(known: KnownBackend) -> dict[str, Any]:
    return {
        "name": known.name,
        "installed": False,
        "usable": False,
        "state": "not installed",
        "formats": sorted(known.formats),
        "problem": known.why_not or "It is not installed.",
        "remedy": known.install,
    }


def doctor_report(findings: Findings) -> RenderableType:
    """A block for each backend, then the problems of plugins."""
    from rich.console import Group
    from rich.text import Text

    machine = findings.machine
    memory = gigabytes(machine.memory_bytes)
    if memory and machine.free_memory_bytes is not None:
        memory += f" ({gigabytes(machine.free_memory_bytes)} free)"
    lines = [
        Text(f"polydraft {machine.polydraft} (contract {machine.contract_version}), Python {machine.python}"),
        Text(f"{machine.system}, {machine.cpus} CPUs" + (f", memory {memory}" if memory else "")),
    ]
    for found in findings.backends:
        lines += [Text(), *_block(found)]
    for known in findings.missing:
        lines += [Text(), _heading(known.name, "not installed", "dim")]
        lines.append(
            _line("install", in_flags(f"`{known.install}`").strip("`"))
            if known.install
            else Text(f"  {known.why_not}", style="dim")
        )
    for status in findings.plugins:
        where = f" ({status.distribution} {status.version})" if status.distribution else ""
        style = "red" if status.state == "broken" else "yellow"
        lines += [Text(), _heading(f"plugin {status.name}{where}", status.state, style), _line("why", status.reason)]
        if status.state == "broken" and (name := status.distribution):
            lines.append(_line("fix", in_flags(f"pip install --upgrade {name}, or pip uninstall {name}")))
    for environment in findings.environments:
        lines += [Text(), _heading(f"environment of {environment.name}", "broken", "red")]
        lines += [_line("why", environment.reason), _line("fix", environment.hint)]
    lines += [Text(f"\n{note}", style="yellow") for note in findings.notes]
    if not findings.usable:
        advice = "" if findings.backends else f" Install one: {in_flags(usual_install())}"
        lines.append(Text(f"\nNo backend is usable here.{advice}", style="bold red"))
    return Group(*lines)


def _block(found: BackendDescription) -> list[Text]:
    from rich.text import Text

    state, record = found.state, found.state.record
    style = "green" if state_of(found) == "usable" else "yellow" if state.usable else "red"
    lines = [_heading(record.name, state_of(found), style)]
    if found.plugin and found.plugin.distribution:
        lines.append(_line("plugin", f"{found.plugin.distribution} {found.plugin.version}"))
    if found.folder is not None:
        lines.append(_line("folder", str(found.folder)))
    if diagnosis := state.diagnosis:
        lines.append(_line("engine", f"{state.distribution} {diagnosis.engine_version or '(not installed)'}"))
        for device in diagnosis.devices:
            memory = gigabytes(device.total_memory_bytes)
            if memory and device.free_memory_bytes is not None:
                memory += f", {gigabytes(device.free_memory_bytes)} free"
            what = ", ".join(part for part in (device.description, memory) if part)
            lines.append(_line("device", f"{device.name}: {what}" if what else device.name))
    if state.problem:
        lines.append(_line("why", in_flags(state.problem)))
    if state.remedy:
        lines.append(_line("fix", in_flags(state.remedy)))
    for fault, version in state.faults:
        does = "refused" if fault.severity == "refuse" else "warning"
        lines.append(_line("fault", f"{fault.distribution} {version}, {fault.affects} ({does}): {fault.summary}"))
        lines.append(_line("", f"{in_flags(fault.remedy)} {fault.link}".strip()))
    if diagnosis is not None:
        lines += [Text(f"  {in_flags(note)}", style="dim") for note in diagnosis.notes]
    return lines


def _heading(name: str, state: str, style: str) -> Text:
    from rich.text import Text

    return Text.assemble((name, "bold"), ": ", (state, style))


def _line(label: str, text: str) -> Text:
    from rich.text import Text

    return Text.assemble((f"  {label:<8}", "dim"), text)
