"""``polydraft pairs``: the registry of targets and their drafters, and the packings of one target."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from polydraft._cli import options as opt
from polydraft._cli.streams import claim_output, console_for
from polydraft._cli.waiting import waiting_for
from polydraft.errors import InvalidRequestError, PolydraftError

if TYPE_CHECKING:
    from polydraft._registry.describe import PairDescription

__all__ = ["pairs"]


def pairs(
    *,
    context: typer.Context,
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEXT]",
            help="Only pairs whose target, drafter or kind contains this; or a model (Hub id, folder, builtin:<name>), "
            "whose packings are shown as well.",
            autocompletion=opt.target_names,
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context-length", min=1, metavar="TOKENS", help="The context that packings must leave room for."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Whose memory packings must fit into: auto, cpu, cuda, ...")
    ] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub for the sizes of packings.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also pairs that no installed backend runs.")] = False,
    json: opt.Json = False,
) -> None:
    """List the known pairs of target and drafter, which backends run them here, and known faults that affect them.

    For one model also its packings: the same weights in other formats and quantizations, their sizes, which backends
    load them, and whether they fit into the free memory. Those marked auto are what is loaded if no quantization is
    named.

    Your own pairs come first: those in the file that POLYDRAFT_PAIRS names, and in pairs.toml in the config folder.
    """
    from polydraft._cli.render.pairs import Listing, pairs_json, pairs_table
    from polydraft._registry.describe import describe_pairs
    from polydraft._registry.describe_packings import describe_packings

    if text is None and (others := opt.given_flags(context, "every", "json", "verbose", "debug")):
        raise InvalidRequestError(
            f"{', '.join(others)} is about the packings of a model.", "Name one: `polydraft pairs MODEL`."
        )
    output = claim_output()
    found = _find(text)
    packings = []
    if text is not None:
        with waiting_for(f"Looking for the packings of {text}"):
            packings = describe_packings(text, context_length=context_length, device=device, local_files_only=offline)
    if packings and not any(pair.entry.pair.target == packings[0].of for pair in found):
        known = describe_pairs(target=packings[0].of)
        found = [*(known or [_unregistered(packings[0].of, packings[0].format)]), *found]
    # Those that run here first; a model that was named stays on top.
    shown = [pair for pair in found if every or pair.can_run]
    if text is None:
        shown.sort(key=lambda pair: not pair.backends)
        if not every:
            shown = [pair for pair in shown if pair.backends] or shown
    meant = _meant(text) if text is not None and not found else ""
    listing = Listing(shown, len(found) - len(shown), packings, text, meant)
    if json:
        print(pairs_json(listing), file=output, flush=True)
    else:
        console_for(output).print(pairs_table(listing))


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


def _unregistered(target: str, form: str) -> PairDescription:
    """With the drafter that ``load`` finds beside it, else with n-grams."""
    from polydraft._load_arguments import checked_arguments
    from polydraft._plugins import default_host
    from polydraft._registry.describe import model_without_pair
    from polydraft._registry.resolver import Resolver

    with suppress(PolydraftError):  # none can be loaded here
        given = checked_arguments(target, {"host": default_host(), "local_files_only": True, "install": "no"})
        plan = Resolver(given).prepare(target).request.plan
        if plan.kind is not None and plan.drafter is not None:
            return model_without_pair(target, form, plan.drafter.id, plan.kind)
    return model_without_pair(target, form, None, "ngram")


def _meant(text: str) -> str:
    from polydraft._registry.describe import describe_pairs
    from polydraft._registry.pairs import base_name
    from polydraft.checkpoints._names import did_you_mean

    known = [found.entry.pair for found in describe_pairs()]
    made_from = [pair for pair in known if pair.drafter and base_name(text).startswith(f"{base_name(pair.target)}-")]
    if made_from:
        pair = max(made_from, key=lambda pair: len(base_name(pair.target)))
        return f"If it was made from {pair.target}, that one's drafter may fit: `--drafter {pair.drafter}`."
    return did_you_mean(text, filter(None, (name for pair in known for name in (pair.target, pair.drafter))))
