"""Tunings that were never measured, kept for ``load`` to find."""

from polydraft._load import prepare
from polydraft._load_arguments import checked_arguments
from polydraft._measuring import identity
from polydraft._plugins import default_host
from polydraft._tune import _store
from polydraft._tune._choice import asked_of
from polydraft._tune._records import TunedRow, TuningResult

TOY = "builtin:toy"
SPEEDS = {("mtp", 4): 100.0, ("mtp", 2): 140.0, ("ngram", 4): 120.0, (None, 0): 110.0}


def rows_of(speeds, target=TOY, backend="reference", **options):
    """Rows as they would have been measured, the fastest first."""
    rows = []
    for (method, k), speed in sorted(speeds.items(), key=lambda entry: -entry[1]):
        drafter = {None: None, "ngram": "ngram"}.get(method, "auto")
        found = prepare(target, backend="reference", drafter=drafter, num_speculative_tokens=k or None, **options)
        plan, hub = found.request.plan, found.request.hub
        rows.append(
            TunedRow(
                backend=backend,
                drafter=plan.drafter.id if plan.drafter else None,
                method=method,
                num_speculative_tokens=k,
                state="measured",
                tokens_per_second=speed,
                versions=identity.installed(default_host(), found.state.record),
                hardware=identity.hardware_of(found),
                target_weights=identity.weights_of(found.request.target, hub),
                drafter_weights=identity.weights_of(plan.drafter, hub) if plan.drafter else None,
            )
        )
    return rows


def keep(speeds=SPEEDS, target=TOY, rows=None, name=None, **options):
    rows = rows_of(speeds, target, **options) if rows is None else rows
    result = TuningResult(
        target=name or rows[0].target_weights.id,
        asked=asked_of(checked_arguments(target, options)),
        processor=identity.cpu_model(),
        created="2026-11-27T01:02:03+00:00",
        seconds=60.0,
        prompts={"code": 2},
        max_new_tokens=64,
        rows=tuple(rows),
        chosen=0,
        kept=True,
    )
    return _store.save(result)
