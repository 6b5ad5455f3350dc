"""The table of ``polydraft pairs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft._cli.render.tables import FittingTable, to_json
from polydraft._flags import in_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from polydraft._registry.describe import PairDescription

__all__ = ["pairs_json", "pairs_table"]


def pairs_json(found: Sequence[PairDescription]) -> str:
    """A list of objects, one per pair."""
    return to_json(
        [
            {
                **pair.entry.pair.model_dump(mode="json", exclude={"num_speculative_tokens"}),
                "num_speculative_tokens": pair.num_speculative_tokens,
                "origin": pair.entry.origin,
                "source": pair.entry.source,
                "variant": pair.entry.variant,
                "backends": list(pair.backends),
                "faults": [fault.model_dump(mode="json") for fault in pair.faults],
            }
            for pair in found
        ]
    )


def pairs_table(found: Sequence[PairDescription], text: str | None) -> RenderableType:
    """One row per pair; below, the faults that affect any of them, once each."""
    from rich.console import Group
    from rich.text import Text

    if not found:
        what = f"No known pair matches {text!r}." if text else "No pair is known."
        return Text(f"{what} Any target runs with --drafter ngram; add pairs of your own with POLYDRAFT_PAIRS.")
    table = FittingTable("target", "drafter", "kind", "format", "k", "runs here on", "from")
    for pair in found:
        entry = pair.entry.pair
        table.add_row(
            entry.target,
            entry.drafter or entry.drafter_file or "-",
            entry.kind,
            entry.format,
            _k(pair),
            Text(", ".join(pair.backends) or "-", style="green" if pair.backends else "dim"),
            pair.entry.source if pair.entry.origin == "user" else pair.entry.origin,
        )
    faults = {fault.id: fault for pair in found for fault in pair.faults}
    lines = [
        Text(
            f"\nKnown fault of {fault.distribution} {fault.versions} ({fault.affects}): "
            f"{fault.summary} {in_flags(fault.remedy)}"
        )
        for fault in faults.values()
    ]
    return Group(table, *lines)


def _k(pair: PairDescription) -> str:
    """One number, or one per backend where they differ."""
    values = pair.num_speculative_tokens
    here = {name: values[name] for name in pair.backends if name in values}
    if len(set(here.values())) > 1:
        return ", ".join(f"{name} {k}" for name, k in here.items())
    return str(next(iter(here.values()), values.get("*", "")))
