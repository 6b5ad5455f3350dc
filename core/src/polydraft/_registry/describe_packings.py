"""The packings of one model, for ``polydraft pairs MODEL``: their sizes, what runs them, and what fits here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._registry.backends import loaders_of
from polydraft._registry.diagnosing import DIAGNOSIS_LIMIT, backend_state
from polydraft._registry.faults import FaultRegistry
from polydraft._registry.offers import Offer, Offers
from polydraft._registry.packing_choice import PackingChoice, memory_of
from polydraft._registry.packings import PackingRegistry
from polydraft._registry.pairs import PairRegistry
from polydraft._registry.states import BackendState
from polydraft.checkpoints._names import KnownNames, parse, repository
from polydraft.checkpoints._resolve import resolve
from polydraft.contract.records import Record
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import InvalidRequestError, PolydraftError

if TYPE_CHECKING:
    from polydraft._plugins import PluginHost

__all__ = ["PackingDescription", "PackingRun", "describe_packings"]

_REQUESTS = 8
"""Repositories that are listed at the same time."""


class PackingRun(Record):
    """One packing on one installed backend."""

    fits: bool | None
    """Whether it fits into the free memory with its context; None: not known."""
    why: str = ""
    """What it needs and what is free, or why it cannot run; one sentence."""
    converted: bool = False
    """Whether the backend makes it of ``source`` on this machine."""
    is_default: bool = False
    """Whether ``load`` takes it for this backend if no quantization is named."""


class PackingDescription(Record):
    """One packing of a model."""

    name: str
    source: str
    of: str
    """The model."""
    format: str
    bytes: int | None
    quantized: bool
    made_here: bool = False
    """Whether it is published nowhere: a backend makes it of ``source``."""
    needs: tuple[str, ...] = ()
    """Backends that would load it, of those that are known and not installed."""
    problem: str = ""
    """Why its size is not known, or why it cannot be had."""
    backends: dict[str, PackingRun]
    """Installed backends that load its format -> how it runs there."""


def describe_packings(
    model: str,
    host: PluginHost | None = None,
    *,
    context_length: int | None = None,
    device: str = "auto",
    local_files_only: bool = False,
) -> list[PackingDescription]:
    """The packings of a model that the registry knows, of a folder or of a built-in; empty for any other name.

    A repository of packings stands for its model. The Hub is asked for the sizes; what cannot be asked is described as
    far as the registry goes. Loads nothing.

    Raises:
        PolydraftError: A folder or file cannot be read; or the user's file of pairs is broken.
    """
    from polydraft._plugins import default_host

    host = default_host() if host is None else host
    packings, pairs = PackingRegistry.load(), PairRegistry.of(host)
    known = KnownNames(host.local_models(), packings.formats() | pairs.formats())
    try:
        name = parse(model)
    except InvalidRequestError:
        return []
    hub = HubOptions(local_files_only=local_files_only)
    if name.kind == "hub":
        repo = packings.base_of(name.value) or repository(model)
        listed = next((one for one in known.formats if one.lower() == repo.lower()), None)
        if listed is None:
            return []
        target = _on_hub(listed, known, hub)
    elif name.kind == "local" and not Path(name.value).exists():
        return []
    else:
        try:
            target = resolve(model, known=known, hub=hub)
        except PolydraftError:
            if name.kind == "local" and Path(model).name == model:
                return []  # a word that is to be looked for, and a folder that happens to have that name
            raise
    offers = Offers(packings, hub, lambda found: resolve(found, known=known, hub=hub))
    choices = [
        (
            state,
            PackingChoice(
                target, offers, state.record, memory_of(state.diagnosis, device), context_length=context_length
            ),
        )
        for state in _states(host, offers.formats(target))
    ]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        every = list(offers.of(target))
        list(pool.map(lambda offer: offer.bytes, every))
    every.sort(key=lambda offer: (-offer.level, offer.quantized, -(offer.bytes or 0), offer.place))
    defaults = {state.record.name: next(iter(choice), None) for state, choice in choices}
    return [_described(offer, target, choices, defaults) for offer in _with_conversions(every, choices)]


def _on_hub(repo: str, known: KnownNames, hub: HubOptions) -> ModelSource:
    """A listed target; without its config where that cannot be had."""
    try:
        return resolve(repo, known=known, hub=hub)
    except PolydraftError:
        return ModelSource(id=repo, kind="hub", format=known.format_of(repo) or "safetensors")


def _states(host: PluginHost, formats: set[str]) -> list[BackendState]:
    faults = FaultRegistry.of(host)
    return [
        backend_state(host, record, faults, seconds=DIAGNOSIS_LIMIT)
        for record in host.backends().values()
        if formats & record.formats
    ]


def _with_conversions(every: list[Offer], choices: list[tuple[BackendState, PackingChoice]]) -> list[Offer]:
    """The packings, and those that a backend makes of one in another quantization."""
    made = {(one.name, one.source): one for _, choice in choices for one in choice.usable if one.makes}
    return [*every, *made.values()]


def _described(
    offer: Offer,
    target: ModelSource,
    choices: list[tuple[BackendState, PackingChoice]],
    defaults: dict[str, Offer | None],
) -> PackingDescription:
    runs = {}
    for state, choice in choices:
        same = [one for one in choice.usable if (one.name, one.source) == (offer.name, offer.source)]
        if not same:
            continue
        default = defaults[state.record.name]
        runs[state.record.name] = _run(same[0], state, choice, is_default=default is not None and default is same[0])
    return PackingDescription(
        name=offer.name,
        source=offer.source,
        of=target.id,
        format=offer.format,
        bytes=None if offer.makes else offer.bytes,
        quantized=offer.quantized,
        made_here=bool(offer.makes),
        needs=() if runs else loaders_of(offer.format),
        problem=offer.problem,
        backends=runs,
    )


def _run(offer: Offer, state: BackendState, choice: PackingChoice, *, is_default: bool) -> PackingRun:
    how: dict[str, Any] = {"converted": offer.converted, "is_default": is_default}
    if state.problem or offer.problem:
        return PackingRun(fits=None, why=state.problem or offer.problem, **how)
    needed = choice.needed(offer)
    if needed is None or choice.memory.free is None:
        return PackingRun(fits=None, why="its size is not known.", **how)
    # Also of a packing that ``load`` would take unchecked, as the only one.
    return PackingRun(fits=needed <= choice.memory.free, why=f"it {choice.needs(needed)}.", **how)
