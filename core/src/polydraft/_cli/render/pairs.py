"""The tables of ``polydraft pairs``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydraft._cli.render.tables import FittingTable, to_json
from polydraft._flags import in_flags
from polydraft._numbers import as_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from polydraft._registry.describe import PairDescription
    from polydraft._registry.describe_packings import PackingDescription

__all__ = ["Listing", "pairs_json", "pairs_table"]


@dataclass(frozen=True)
class Listing:
    """What one call shows."""

    pairs: Sequence[PairDescription]
    hidden: int
    """Further pairs, which no installed backend runs."""
    packings: Sequence[PackingDescription]
    """Of the one model that was named; empty if none was."""
    text: str | None
    meant: str = ""
    """Which names it may have meant, if it matches none; one sentence."""


def pairs_json(listing: Listing) -> str:
    """A list of objects, one per pair; those of the model that was named have its ``packings``."""
    of = listing.packings[0].of if listing.packings else None
    packings = [packing.model_dump(mode="json") for packing in listing.packings]
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
                "packings": packings if pair.entry.pair.target == of else [],
            }
            for pair in listing.pairs
        ]
    )


def pairs_table(listing: Listing) -> RenderableType:
    """One row per pair, then one per packing; below, the faults that affect any of them, once each."""
    from rich.console import Group
    from rich.text import Text

    found, text = listing.pairs, listing.text
    hidden = []
    if listing.hidden:
        more = f"{listing.hidden} {'more pairs are' if listing.hidden > 1 else 'more pair is'}"
        hidden = [Text(f"\n{more} not for the backends that are installed: --all lists them.", style="dim")]
    if not found:
        what = f"No known pair matches {text!r}. {listing.meant}".strip() if text else "No pair is known."
        plain = f"{what} Any target runs with --drafter ngram; add pairs of your own with POLYDRAFT_PAIRS."
        return Group(Text(plain), *_packings(listing.packings), *hidden)
    own = any(pair.entry.origin == "user" for pair in found)
    table = FittingTable("target", "drafter", "kind", "format", "k", "runs here on", *(["from"] if own else []))
    for pair in found:
        entry = pair.entry.pair
        table.add_row(
            entry.target,
            entry.drafter or entry.drafter_file or "-",
            entry.kind,
            entry.format,
            _k(pair),
            Text(", ".join(pair.backends) or "-", style="green" if pair.backends else "dim"),
            *([pair.entry.source if pair.entry.origin == "user" else pair.entry.origin] if own else []),
        )
    taken = []
    if text and all(pair.entry.variant for pair in found):
        of = found[0].entry.pair.target
        taken = [Text(f"\n{text} is not listed. It is taken for another packing of {of}, by its name.", style="dim")]
    faults = {fault.id: fault for pair in found for fault in pair.faults}
    lines = [
        Text(
            f"\nKnown fault of {fault.distribution} {fault.versions} ({fault.affects}): "
            f"{fault.summary} {in_flags(fault.remedy)}"
        )
        for fault in faults.values()
    ]
    return Group(table, *taken, *_packings(listing.packings), *lines, *hidden)


def _packings(found: Sequence[PackingDescription]) -> list[RenderableType]:
    from rich.text import Text

    if not found:
        return []
    table = FittingTable("packing", "weights", "format", "size", "runs here on", "fits here")
    for packing in found:
        size = "made here" if packing.made_here else "not known"
        table.add_row(
            packing.name,
            packing.source,
            packing.format,
            size if packing.bytes is None else as_size(packing.bytes),
            _runs(packing),
            _fit(packing),
        )
    problems = [one.problem for one in found if one.problem]
    more = f" ({len(problems) - 1} more are not known for a like reason)" if len(problems) > 1 else ""
    lines = [Text(f"\nNot known: {in_flags(problems[0])}{more}", style="dim")] if problems else []
    title = Text(
        f"\nPackings of {found[0].of}: --quantization NAME chooses one; auto is the least quantized that fits.\n"
    )
    return [title, table, *lines]


def _runs(packing: PackingDescription) -> Text:
    """The installed backends that load it, else one that would."""
    from rich.text import Text

    names = []
    for name, run in packing.backends.items():
        how = [word for word, holds in (("auto", run.is_default), ("converted", run.converted)) if holds]
        names.append(f"{name} ({', '.join(how)})" if how else name)
    if not names:
        return Text(f"needs {packing.needs[0]}" if packing.needs else "-", style="dim")
    return Text(", ".join(names), style="green")


def _fit(packing: PackingDescription) -> Text:
    """``yes``, ``no: it needs ...``, or one of them for each backend where they differ."""
    from rich.text import Text

    words = {True: "yes", False: "no", None: "not known"}
    said = {name: f"{words[run.fits]}: {run.why}" for name, run in packing.backends.items()}
    if len(set(said.values())) > 1:
        return Text("; ".join(f"{name} {one}" for name, one in said.items()))
    fits = next((run.fits for run in packing.backends.values()), None)
    return Text(next(iter(said.values()), ""), style={True: "green", False: "yellow", None: "dim"}[fits])


def _k(pair: PairDescription) -> str:
    """One number, or one per backend where they differ."""
    values = pair.num_speculative_tokens
    here = {name: values[name] for name in pair.backends if name in values}
    if len(set(here.values())) > 1:
        return ", ".join(f"{name} {k}" for name, k in here.items())
    return str(next(iter(here.values()), values.get("*", "")))
