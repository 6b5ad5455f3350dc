"""``polydraft pairs``: the registry of targets and their drafters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from polydraft._cli import options as opt
from polydraft._cli.streams import claim_output, console_for

if TYPE_CHECKING:
    from polydraft._registry.describe import PairDescription

__all__ = ["pairs"]


def pairs(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEXT]", help="Only pairs whose target, drafter or kind contains this; or a target's id."
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """List the known pairs of target and drafter, which backends run them here, and known faults that affect them.

    Your own pairs come first: those in the file that POLYDRAFT_PAIRS names, and in pairs.toml in the config folder.
    """
    from polydraft._cli.render.pairs import pairs_json, pairs_table

    output = claim_output()
    found = _find(text)
    if json:
        print(pairs_json(found), file=output, flush=True)
    else:
        console_for(output).print(pairs_table(found, text))


def _find(text: str | None) -> list[PairDescription]:
    from polydraft._registry.describe import describe_pairs

    every = describe_pairs()
    if text is None:
        return every
    part = text.lower()
    holding = [
        found
        for found in every
        if any(part in (name or "").lower() for name in (found.entry.pair.target, found.entry.pair.drafter))
        or part == found.entry.pair.kind
    ]
    # A target that is not listed may still be another packing of one that is.
    return holding or describe_pairs(target=text)
