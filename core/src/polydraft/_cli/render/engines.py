"""The table of ``polydraft engines list``, and what its other commands say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft._cli.render.tables import FittingTable, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from polydraft._environments.records import EngineState, Environment

__all__ = ["engines_json", "engines_table", "environment_data", "environment_lines"]

_STYLES = {"installed here": "green", "installed": "green", "not installed": "dim", "broken": "red"}


def engines_json(found: Sequence[EngineState]) -> str:
    """``{"engines": [...]}``, with the fields of ``EngineState``."""
    return to_json({"engines": [{**state.model_dump(mode="json"), "usable": state.usable} for state in found]})


def engines_table(found: Sequence[EngineState]) -> RenderableType:
    """One row per engine; then why some cannot be used or installed, and the commands."""
    from rich.console import Group
    from rich.text import Text

    table = FittingTable("engine", "state", "backends", "for", "disk", "minutes", "versions")
    lines: list[Text] = []
    for state in found:
        about = "" if state.usable else "about "
        table.add_row(
            Text(state.name, style="bold"),
            Text(f"{state.state}, update available" if state.update else state.state, style=_STYLES[state.state]),
            ", ".join(state.backends),
            state.accelerator or "",
            f"{about}{state.disk_bytes / 1e9:.1f} GB" if state.disk_bytes is not None else "",
            f"about {state.minutes}" if state.minutes is not None else "",
            ", ".join(f"{name} {version}" for name, version in state.versions.items() if name != "polydraft"),
        )
        why = " ".join(part for part in (state.reason, state.update, state.why_not) if part)
        if why or (state.command and not state.usable):
            command = f" `{state.command}`" if state.command else ""
            lines.append(Text.assemble((f"{state.name}: ", "bold"), f"{why}{command}".strip()))
    return Group(table, *([Text()] if lines else []), *lines)


def environment_data(environment: Environment, made: bool) -> dict[str, Any]:
    """What was installed, ready for JSON; ``made`` tells whether it was made by this command."""
    return {
        "name": environment.name,
        "made": made,
        "folder": str(environment.folder),
        "python": str(environment.python),
        "python_version": environment.python_version,
        "accelerator": environment.accelerator,
        "source": environment.source.model_dump(mode="json"),
        "backends": [*environment.backends],
        "versions": environment.versions,
        "self_tests": [test.model_dump(mode="json") for test in environment.self_tests],
        "notes": list(environment.notes),
        "disk_bytes": environment.bytes,
    }


def environment_lines(environment: Environment, made: bool) -> str:
    """What was installed, in a few lines."""
    name, tests = environment.name, environment.self_tests
    # Tested backends come first: an engine's further ones are servers.
    backend = next((test.backend for test in tests), next(iter(environment.backends)))
    if not made:
        return f"{name} is installed and up to date: {environment.folder}"
    lines = [
        f"{name} is installed, {environment.bytes / 1e9:.1f} GB, from {environment.source}: {environment.folder}",
        *(
            f"{test.backend} decoded {test.target} on {test.device} with speculation and plainly to the same "
            f"{test.tokens} tokens."
            for test in tests
        ),
        f"Use it: `polydraft generate --backend {backend}`, or `backend={backend!r}` in Python.",
    ]
    return "\n".join(lines)
