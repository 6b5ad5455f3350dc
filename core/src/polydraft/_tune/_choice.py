"""What ``load`` makes of a kept tuning: the fastest of what was measured, for what the caller leaves open.

A tuning counts for the same target, arguments and processor, and of it a row counts if the weights, the drafter's, the
versions and builds of the engine and the devices are those that were measured. Looking costs a few milliseconds where
something is kept, and a look into an empty folder where nothing is: of weights, only names, inodes, sizes and times are
read, and where those differ, as after a copy, digests that are known from before. No large file is read.

What the caller names wins: a drafter, or a k, is measured against others of the same only. ``drafter="auto"`` without a
k gets plain decoding where that was the fastest.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from polydraft import reasons
from polydraft._flags import FLAGS, words
from polydraft._load_arguments import DEFAULTS
from polydraft._measuring.identity import hardware_of, installed, name_of, options_of, same_weights
from polydraft._registry.packing_choice import PackingNotFoundError
from polydraft._tune._records import Asked
from polydraft._tune._store import kept
from polydraft.contract.requests import SpeculationPlan
from polydraft.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    DeviceError,
    OutOfMemoryError,
    PluginError,
    UnsupportedError,
)
from polydraft.hardware import cpu_model
from polydraft.verification._gate import command_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from polydraft._plugins import PluginHost
    from polydraft._registry.resolver import Prepared, Resolver
    from polydraft._tune._records import TunedRow, TuningResult

__all__ = ["asked_of", "prepared_as_measured", "tune_command"]

_log = logging.getLogger("polydraft.load")
_NOT_NOW = (
    *(BackendUnavailableError, DeviceError, OutOfMemoryError, PackingNotFoundError, PluginError, UnsupportedError),
)
"""Why a backend that was measured cannot be used now."""


def prepared_as_measured(resolver: Resolver, target: str | Path, given: Mapping[str, Any]) -> Prepared:
    """The load as it was measured to be fastest; else as the rules choose, with a note where a tuning fell out.

    Args:
        resolver: Of the load.
        target: As for ``load``.
        given: All arguments of ``load``, checked.

    Raises:
        PolydraftError: As for ``Resolver.prepare``.
    """
    open_choices = given["backend"] == "auto" or (given["num_speculative_tokens"] is None and given["drafter"])
    if not open_choices:
        return resolver.prepare(target)
    if given["backend"] != "auto" and given["backend"] not in resolver.host.backends():
        return resolver.prepare(target)  # the error
    tuning = _tuning(resolver, target, given)
    row = _best(tuning, given) if tuning else None
    if tuning is None or row is None:
        return resolver.prepare(target)
    try:
        found = resolver.asking(**_arguments(row, given)).prepare(target)
        why_not = _changed(row, found, resolver.host)
        if not why_not:
            return _as_measured(found, tuning, row, given)
    except BackendNotFoundError:
        why_not = f"the backend {row.backend}, the fastest then, is not installed any more"
    except _NOT_NOW as error:
        why_not = f"{row.label}, the fastest then, cannot be used now: {error.message.rstrip('.')}"
    note = (
        f"The usual rules apply, as the measurement of {tuning.created[:10]} does not: {why_not}. "
        f"Measure again: `{tune_command(target, given)}`"
    )
    _log.info(note)
    found = resolver.prepare(target)
    return _with_plan(found, found.request.plan, note)


def asked_of(given: Mapping[str, Any]) -> Asked:
    """The arguments of ``load`` that a tuning holds for."""
    return Asked(
        dtype=given["dtype"],
        device=given["device"],
        exactness=given["exactness"],
        context_length=given["context_length"],
        quantization=given["quantization"],
        trust_remote_code=given["trust_remote_code"],
        engine_options=options_of(given["engine_options"]),
    )


def tune_command(target: str | Path, given: Mapping[str, Any]) -> str:
    """The command that measures what these arguments of ``load`` load."""
    measured = {"backend", "drafter", "num_speculative_tokens", "prefix_cache_bytes"}
    arguments = {**given, "target": str(target), "engine_options": options_of(given["engine_options"])}
    names = [
        name
        for name in FLAGS
        if name not in measured and arguments.get(name, DEFAULTS.get(name)) not in (DEFAULTS.get(name), {})
    ]
    return shlex.join(["polydraft", "tune", *(word for name in names for word in words(name, arguments[name]))])


def _tuning(resolver: Resolver, target: str | Path, given: Mapping[str, Any]) -> TuningResult | None:
    """The newest kept tuning of this target with these arguments on this processor."""
    asked, processor = asked_of(given), cpu_model()
    fitting = [one for one in kept() if one.asked == asked and one.processor == processor]
    if not fitting:
        return None
    source = resolver.target(target)
    name = name_of(source)
    for one in fitting:
        if one.target == name and one.revision == source.revision:
            return one
        # Under another name, the same bytes: a folder that was moved or copied.
        weights = one.choice.target_weights if one.choice else None
        if source.kind == "local" and weights and same_weights(weights, source, resolver.hub):
            return one
    return None


def _best(tuning: TuningResult, given: Mapping[str, Any]) -> TunedRow | None:
    """The fastest row that is what the caller asked for; rows are sorted by speed, the chosen one first."""
    rows = [row for row in tuning.rows if row.state in {"measured", "dropped"} and row.tokens_per_second]
    if given["backend"] != "auto":
        rows = [row for row in rows if row.backend == given["backend"]]
    elif not all(row.quantized for row in rows):  # nobody is given quantized weights unasked
        rows = [row for row in rows if not row.quantized]
    drafter, k = given["drafter"], given["num_speculative_tokens"]
    if drafter is None:
        rows = [row for row in rows if not row.method]
    elif drafter == "ngram":
        rows = [row for row in rows if row.method == "ngram"]
    elif drafter != "auto":
        rows = [row for row in rows if row.drafter == str(drafter)]
    if k is not None:  # "auto": whatever k was measured, that of each round is picked by the loop
        rows = [row for row in rows if row.method and k in ("auto", row.num_speculative_tokens)]
    return rows[0] if rows else None


def _arguments(row: TunedRow, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``load`` that give a row."""
    drafter = given["drafter"]
    if drafter == "auto":
        # By the rules: what they choose is compared with the row.
        drafter = None if row.method is None else "ngram" if row.method == "ngram" else "auto"
    k = given["num_speculative_tokens"] or row.num_speculative_tokens or None
    return {"backend": row.backend, "drafter": drafter, "num_speculative_tokens": k}


def _changed(row: TunedRow, found: Prepared, host: PluginHost) -> str:
    """What is not as it was measured, as part of a sentence; empty if all is."""
    request = found.request
    plan = request.plan
    if row.target_weights is None or not same_weights(row.target_weights, request.target, request.hub):
        return "the target's files have changed, or were copied"
    if row.method != plan.kind or (row.method and row.drafter != (plan.drafter.id if plan.drafter else None)):
        return f"the drafter was {row.drafter or row.method}, and is {plan.drafter.id if plan.drafter else plan.kind}"
    if plan.drafter is not None and (
        row.drafter_weights is None or not same_weights(row.drafter_weights, plan.drafter, request.hub)
    ):
        return "the drafter's files have changed, or were copied"
    now = installed(host, found.state.record)
    if now != row.versions:
        names = sorted(name for name in now.keys() | row.versions.keys() if now.get(name) != row.versions.get(name))
        return f"another version or build of {', '.join(names)} is installed"
    if hardware_of(found) != row.hardware:
        return f"the devices were {row.hardware}, and are {hardware_of(found)}"
    return ""


def _as_measured(found: Prepared, tuning: TuningResult, row: TunedRow, given: Mapping[str, Any]) -> Prepared:
    """The request with the reason of the choice, in figures."""
    plan = found.request.plan
    plain = tuning.fastest(row.backend, plain=True)
    speed = f"{row.tokens_per_second:.1f} tokens/s"
    chosen = {"backend": "measured"} if given["backend"] == "auto" else {}
    if given["num_speculative_tokens"] is None and given["drafter"] is not None:
        chosen["num_speculative_tokens"] = "measured"
    if given["drafter"] == "auto":
        chosen["drafter"] = "measured"
    if row.method is None:
        note = f"Measured on {tuning.created[:10]}: {row.label} makes {speed}."
        other = tuning.fastest(row.backend, plain=False)
        if given["drafter"] == "auto" and other is not None:
            plan = SpeculationPlan(
                off=reasons.slower(
                    f"It was measured to be slower here on {tuning.created[:10]}: {other.label} makes "
                    f"{other.tokens_per_second:.1f} tokens/s, plain decoding {speed}; "
                    f"`num_speculative_tokens={other.num_speculative_tokens}` turns it on."
                )
            )
    else:
        than = f", plain decoding {plain.tokens_per_second:.1f}" if plain else ""
        note = f"Measured on {tuning.created[:10]}: {row.label} makes {speed}{than}."
        if row.verdict is None:
            verified = {
                **given,
                "target": tuning.target,
                "backend": row.backend,
                "drafter": row.drafter or row.method,
                "num_speculative_tokens": row.num_speculative_tokens,
                "engine_options": options_of(given["engine_options"]),
            }
            note += f" It was not verified then: `{command_of(verified)}` does."
    _log.info(note)
    request = found.request.model_copy(update={"chosen_by": found.request.chosen_by.model_copy(update=chosen)})
    drafter = {"chosen_by": "measured"} if given["drafter"] == "auto" and plan.kind else {}
    plan = plan.model_copy(update=drafter)
    return _with_plan(replace(found, request=request), plan, note)


def _with_plan(found: Prepared, plan: SpeculationPlan, note: str) -> Prepared:
    """With a plan whose note has one more sentence."""
    plan = plan.model_copy(update={"note": " ".join(filter(None, (note, plan.note)))})
    return replace(found, request=found.request.model_copy(update={"plan": plan}))
