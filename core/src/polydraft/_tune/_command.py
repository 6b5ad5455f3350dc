"""``tune``: measure, choose, keep. What ``polydraft.tune`` and ``polydraft tune`` call."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from polydraft._flags import words
from polydraft._load_arguments import checked_arguments, refuse_in_measurements
from polydraft._measuring.arguments import (
    LOAD_LIMIT,
    checked_backends,
    checked_prompts,
    checked_seconds,
    checked_tokens,
    classes,
    open_bench,
)
from polydraft._measuring.calls import seconds_per_token
from polydraft._measuring.charts import folder_to_save
from polydraft._measuring.identity import name_of, options_of
from polydraft._registry.resolver import Resolver
from polydraft._sealed import check_writable, keep_result
from polydraft._tune import _chart
from polydraft._tune._choice import asked_of
from polydraft._tune._records import TunedRow, TuningResult
from polydraft._tune._search import LONGEST_CHECK, Candidate, Limits, Search
from polydraft._tune._store import folder, save
from polydraft.contract.results import GenerationStats
from polydraft.errors import BackendUnavailableError, InvalidRequestError, PolydraftError
from polydraft.files import system_errors
from polydraft.hardware import cpu_model
from polydraft.verification._gate import command_of

if TYPE_CHECKING:
    from polydraft._load_arguments import LoadArguments
    from polydraft.contract.requests import ModelSource

__all__ = ["DEFAULT_SECONDS", "tune"]

DEFAULT_SECONDS = 240.0


def tune(
    target: str | Path,
    *,
    seconds: float = DEFAULT_SECONDS,
    prompts: str | Path | Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    max_new_tokens: int | None = None,
    backends: Sequence[str] | None = None,
    load_limit: float = LOAD_LIMIT,
    save_to: str | Path | None = None,
    keep: bool = True,
    progress: Callable[[str], None] | None = None,
    **arguments: Any,
) -> TuningResult:
    """Measure which backend, drafter and k are fastest for a target on this machine, and let ``load`` use it.

    Each backend that can load the target is measured plainly and with speculation: with the drafter that belongs to the
    target, with n-gram drafting, and with those k that may be best. What counts is the time of whole calls of
    ``Session.generate``. Each engine runs in a process of its own; candidates take turns, those that are surely slower
    are dropped, and the rest of the time goes to the others. What fails or is refused is a row with its reason. Do
    nothing else on the machine meanwhile.

    ``load(backend="auto")`` and ``num_speculative_tokens=None`` then use the fastest, as long as weights, versions and
    hardware are those that were measured; ``session.running.chosen_by`` says so. Ctrl+C ends the measurement early:
    the result holds what was measured so far, and is not kept.

    Args:
        target: As for ``polydraft.load``.
        seconds: Time for measuring; the starts of engines come on top.
        prompts: What to decode: a list of prompts as ``Session.generate`` takes them, a mapping of classes to such
            lists, or a file: plain text with lines of ``---`` between prompts, ``.json`` or ``.jsonl``. None: a
            built-in set of code, prose, chats and lists.
        max_new_tokens: Length of the outputs; None: 64, or fewer where the machine is slow.
        backends: Names of backends; None: all that can run here.
        load_limit: Seconds after which an engine that has not been loaded is given up.
        save_to: A folder for ``tuning.json``, ``tuning.png`` and ``tuning.svg``; the charts need ``polydraft[charts]``.
        keep: Keep the result for ``load``.
        progress: Called with a sentence on what is done next.
        **arguments: Further arguments of ``polydraft.load``. A ``drafter`` is the only one that is measured,
            ``num_speculative_tokens`` the only k besides 0, and ``backend`` the only backend. With ``host`` all engines
            are loaded into this process, since no other has its plugins.

    Raises:
        InvalidRequestError: An argument is wrong.
        BackendUnavailableError: Nothing could be measured; the reasons are in the sentence.
        NotSavedError: The result cannot be saved in a folder that could be written at first; it has the result.
        PolydraftError: As for ``load``; or the result cannot be kept, or the folder cannot be written.
    """
    given = checked_arguments(target, arguments)  # type: ignore[arg-type]
    refuse_in_measurements(given)
    k = given["num_speculative_tokens"]
    if k == "auto":
        raise InvalidRequestError(
            "`num_speculative_tokens='auto'` is no fixed k, and fixed ones are measured.",
            "Leave it out, or give a number.",
            argument="num_speculative_tokens",
        )
    limits = Limits(
        checked_seconds("seconds", seconds), None if max_new_tokens is None else checked_tokens(max_new_tokens), k
    )
    load_limit = checked_seconds("load_limit", load_limit)
    chosen_prompts = checked_prompts(prompts)
    if save_to is not None:
        save_to, no_chart = folder_to_save(save_to, progress)
    with system_errors(f"{target} cannot be measured"):
        if keep:
            keep_result(lambda: check_writable(folder()), f"A measurement of {target}")
        resolver = Resolver(given)
        if backends is not None and len(named_ones := checked_backends(backends, resolver.host)) == 1:
            resolver = resolver.asking(backend=named_ones[0])  # a server's names are known by the backend
        source = resolver.target(target)
        names = _names(backends, given, resolver, source)
        named = backends is not None or given["backend"] != "auto"
        bench = open_bench(target, given, named=named, load_limit=load_limit)
        search = Search(bench, chosen_prompts, limits, clock=time.monotonic, progress=progress or (lambda _: None))
        result = TuningResult(
            target=name_of(source),
            revision=source.revision,
            asked=asked_of(given),
            processor=cpu_model(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=0.0,
            prompts=classes(chosen_prompts),
            max_new_tokens=0,
            rows=(),
        )
        result = _measured(search, names, result, given)
        if not result.interrupted and keep:
            result = result.model_copy(update={"kept": True})
            keep_result(lambda: save(result), f"A measurement of {target}")
    if save_to is not None and any(row.tokens_per_second for row in result.rows):
        result = result.model_copy(update={"notes": (*result.notes, *no_chart)})
        _chart.save(result, Path(save_to))
    return result


def _measured(search: Search, names: Sequence[str], result: TuningResult, given: LoadArguments) -> TuningResult:
    """Run the search with these arguments of ``load``, and put what it found into the result."""
    interrupted = False
    try:
        try:
            search.run(names)
        except KeyboardInterrupt:
            interrupted = True
        rows = tuple(_with_command(row, result.target, given) for row in _rows(search))
    finally:
        with suppress(PolydraftError):  # an engine that cannot be closed has been measured
            search.bench.close()
    chosen = next((at for at, row in enumerate(rows) if row.state == "measured"), None)
    if chosen is None and not interrupted:
        raise BackendUnavailableError(
            f"Nothing could be measured for {result.target}. "
            + " ".join(f"{row.label}: {row.reason}" for row in rows if row.reason),
            "`polydraft doctor` shows more about each backend.",
        )
    return result.model_copy(
        update={
            "seconds": round(search.spent, 1),
            "max_new_tokens": search.max_new_tokens,
            "rows": rows,
            "chosen": chosen,
            "confidence": search.confidence(),
            "interrupted": interrupted,
            "notes": tuple(_notes(search, rows, interrupted)),
        }
    )


def _with_command(row: TunedRow, target: str, given: LoadArguments) -> TunedRow:
    """With the command that shows how speculation changed the output, if it did."""
    if row.verdict != "DIVERGED":
        return row
    arguments = {
        **given,
        "target": target,
        "backend": row.backend,
        "drafter": row.drafter or row.method,
        "num_speculative_tokens": row.num_speculative_tokens,
        "engine_options": options_of(given["engine_options"]),
    }
    longer = shlex.join(words("time_limit", f"{LONGEST_CHECK:g}"))
    return row.model_copy(update={"reason": f"{row.reason} `{command_of(arguments)} {longer}` shows where."})


def _notes(search: Search, rows: Sequence[TunedRow], interrupted: bool) -> list[str]:
    notes = []
    if interrupted:
        notes.append("It was interrupted: this is what was measured so far, and it is not kept.")
    best = next((row for row in rows if row.state == "measured"), None)
    if best is None:
        return notes
    if search.confidence() is None:
        notes.append("There was time for fewer than three rounds of all that were left: more `seconds` say more.")
    if best.method and best.verdict is None:
        notes.append("There was no time to verify it: `polydraft verify` does.")
    plains = [row for row in rows if not row.method and row.tokens_per_second and row.quantized == best.quantized]
    plain = max(plains, key=lambda row: row.tokens_per_second or 0.0, default=None)  # of any engine
    wrong = [row for row in rows if row.backend == best.backend and row.verdict == "DIVERGED"]
    if best.method is None and wrong:
        notes.append(f"{wrong[0].label} changed the output, so `load` leaves speculation off unless it is asked for.")
    elif best.method is None and any(row.method and row.tokens_per_second for row in rows):
        notes.append("Speculation was slower than plain decoding here, so `load` leaves it off unless it is asked for.")
    elif best.method and plain and best.tokens_per_second and plain.tokens_per_second:
        times = best.tokens_per_second / plain.tokens_per_second
        notes.append(f"{best.label} is {times:.2f} times as fast as {plain.label}.")
    return notes


def _rows(search: Search) -> tuple[TunedRow, ...]:
    """What is left first, the fastest on top; then what was dropped; then what could not be measured."""
    leaders = search.leaders
    others = sorted((one for one in search.candidates if one not in leaders), key=lambda one: one.seconds_per_token)
    plains = {one.group.backend: one for one in search.candidates if not one.k}
    rows = [_row(search, one, plains.get(one.group.backend)) for one in (*leaders, *others)]
    rows += [
        TunedRow(
            backend=skipped.backend,
            drafter=skipped.way.drafter,
            method=skipped.way.method,
            num_speculative_tokens=skipped.k,
            state=skipped.state,
            reason=skipped.reason,
        )
        for skipped in search.skipped
    ]
    return tuple(rows)


def _row(search: Search, one: Candidate, plain: Candidate | None) -> TunedRow:
    info = search.bench.info(one.group)
    samples = list(one.samples.values())
    stats = GenerationStats.total(one.stats for one in samples) if samples else None
    by_class: dict[str, float] = {}
    for kind in classes(search.prompts):
        keys = [key for key in one.samples if search.prompts[key[0]].kind == kind]
        if keys:
            by_class[kind] = _rate(one, keys)
    rounds = [_rate(one, [key for key in one.samples if key[1] == number]) for number in sorted(one.rounds)]
    firsts = [sample.first_token_seconds for sample in samples if sample.first_token_seconds is not None]
    same = None
    if plain is not None and one.k:
        # Greedy outputs of a prompt are the same in every round.
        expected = {
            prompt: sample.digest for (prompt, _), sample in plain.samples.items() if sample.digest and not sample.cut
        }
        found = [
            (key[0], sample.digest)
            for key, sample in one.samples.items()
            if key[0] in expected and sample.digest and not sample.cut
        ]
        same = all(digest == expected[prompt] for prompt, digest in found) if found else None
    return TunedRow(
        backend=one.group.backend,
        drafter=one.group.way.drafter if one.k else None,
        method=one.group.way.method if one.k else None,
        num_speculative_tokens=one.k,
        packing=info.packing,
        quantized=info.quantized,
        state=one.state if samples or one.state != "measured" else "failed",
        reason=one.reason,
        tokens_per_second=_rate(one, one.samples) if samples else None,
        spread=(min(rounds), max(rounds)) if rounds else None,
        by_class=by_class,
        first_token_seconds=median(firsts) if firsts else None,
        acceptance_rate=stats.acceptance_rate if stats and one.k else None,
        acceptance_rate_per_position=stats.acceptance_rate_per_position if stats and one.k else None,
        rounds=len(rounds),
        load_seconds=info.load_seconds,
        peak_memory_bytes=info.peak_memory_bytes,
        device_memory_bytes=info.device_memory_bytes,
        verdict=one.verdict,
        same_as_plain=same,
        dtype=info.dtype,
        device=info.device,
        versions=info.versions,
        hardware=info.hardware,
        target_weights=info.target_weights,
        drafter_weights=info.drafter_weights if one.k else None,
    )


def _rate(one: Candidate, calls: Iterable[tuple[int, int]]) -> float:
    """Tokens/s of some of its calls."""
    return 1 / seconds_per_token({key: one.samples[key] for key in calls}, median, one.undisturbed)


def _names(backends: Sequence[str] | None, given: LoadArguments, resolver: Resolver, source: ModelSource) -> list[str]:
    """The backends to measure: those that are named, else all that load this format."""
    if backends is not None:
        return checked_backends(backends, resolver.host)
    if given["backend"] != "auto":
        return checked_backends([given["backend"]], resolver.host)
    records = resolver.candidates(source)
    resolver.check_device(records)
    return [record.name for record in records]
