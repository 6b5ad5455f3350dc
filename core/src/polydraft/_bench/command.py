"""``bench``: speculative decoding beside plain decoding. What ``polydraft.bench`` and ``polydraft bench`` call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polydraft._bench import chart
from polydraft._bench.records import BenchResult
from polydraft._bench.rows import rows_of
from polydraft._bench.turns import Turns
from polydraft._load import prepare
from polydraft._load_arguments import DEFAULTS, checked_arguments, refuse_in_measurements
from polydraft._measuring.arguments import (
    LOAD_LIMIT,
    checked_backends,
    checked_prompts,
    checked_seconds,
    checked_tokens,
    classes,
    open_bench,
)
from polydraft._measuring.bench import AnyK, CallSettings
from polydraft._measuring.charts import folder_to_save
from polydraft._measuring.identity import name_of, options_of
from polydraft._numbers import as_float, as_int, shown
from polydraft._plugins import default_host
from polydraft._registry.resolver import Resolver
from polydraft.errors import BackendUnavailableError, InvalidRequestError, PolydraftError
from polydraft.files import system_errors
from polydraft.hardware import cpu_model

if TYPE_CHECKING:
    from polydraft._bench.records import BenchRow
    from polydraft._load_arguments import LoadArguments

__all__ = ["bench"]


def bench(
    target: str | Path,
    *,
    num_speculative_tokens: AnyK | Sequence[AnyK] | None = None,
    sweep_k: bool = False,
    against: Literal["upstream"] | None = None,
    synthetic_acceptance: float | None = None,
    prompts: str | Path | Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    max_new_tokens: int = 64,
    ignore_eos: bool = False,
    temperature: float = 0.0,
    repeats: int = 5,
    backends: Sequence[str] | None = None,
    load_limit: float = LOAD_LIMIT,
    save_to: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **arguments: Any,
) -> BenchResult:
    """Measure speculative decoding beside plain decoding, on any backend and pair.

    All sides decode the same prompts in alternating order, after a round that does not count; figures are medians, with
    the slowest and the fastest repeat. Each engine runs in a process of its own, in which plain decoding uses the
    engine's fastest path. Do nothing else on the machine meanwhile. Ctrl+C ends it early: the result holds what was
    measured so far, unless that is nothing.

    Args:
        target: As for ``polydraft.load``.
        num_speculative_tokens: k, several of them, or ``"auto"`` among them; None: the recommended one.
        sweep_k: Measure every k from 1 to 8, or to twice the recommended one.
        against: ``"upstream"``: the engine's own speculative decoding takes part, too, such as Transformers'
            ``generate(assistant_model=)``, with the same weights, k and limits.
        synthetic_acceptance: Accept each draft with this chance if those before it were, whatever the target chooses:
            for random weights, or to ask what a better drafter would bring. Every output names it.
        prompts: What to decode: a list of prompts as ``Session.generate`` takes them, a mapping of classes to such
            lists, or a file: plain text with lines of ``---`` between prompts, ``.json`` or ``.jsonl``. None: a
            built-in set of code, prose, chats and lists.
        max_new_tokens: Length of the outputs.
        ignore_eos: Do not end outputs early; so it is with ``synthetic_acceptance``.
        temperature: 0 is greedy; else repeat i samples with the seed i.
        repeats: How often each prompt counts.
        backends: Names of backends to compare; None: the one that ``load`` would choose.
        load_limit: Seconds after which an engine that has not been loaded is given up.
        save_to: A folder for ``bench.json``, which is written after each repeat, too, ``bench.png`` and ``bench.svg``;
            the charts need ``polydraft[charts]``.
        progress: Called with a sentence on what has been done, or is done next.
        **arguments: Further arguments of ``polydraft.load``. With ``host`` all engines are loaded into this process.

    Raises:
        InvalidRequestError: An argument is wrong.
        UnsupportedError: A backend has no speculative decoding of its engine's own for this drafter, or keeps its own
            loop, in which acceptance cannot be set.
        BackendUnavailableError: Nothing could be measured; the reasons are in the sentence.
        NotSavedError: The result cannot be saved in a folder that could be written at first; it has the result.
        PolydraftError: As for ``load``; or the folder cannot be written.
    """
    ks = _checked_ks(target, num_speculative_tokens, sweep_k, arguments)
    given = checked_arguments(target, arguments)  # type: ignore[arg-type]
    refuse_in_measurements(given)
    chance = _checked_chance(synthetic_acceptance)
    settings = CallSettings(
        max_new_tokens=checked_tokens(max_new_tokens),
        ignore_eos=ignore_eos or chance is not None,
        temperature=_checked_temperature(temperature),
        synthetic_acceptance=chance,
    )
    _check_together(against, settings, given["drafter"])
    repeats = _checked_repeats(repeats)
    load_limit = checked_seconds("load_limit", load_limit)
    chosen = checked_prompts(prompts)
    if save_to is not None:
        save_to, no_chart = folder_to_save(save_to, progress)
    with system_errors(f"{target} cannot be measured"):
        host = given["host"] or default_host()
        if backends is not None:
            names = checked_backends(backends, host)
        elif given["backend"] != "auto":
            names = checked_backends([given["backend"]], host)
        else:
            names = [prepare(target, **arguments).request.backend]
        resolver = Resolver(given)
        # A server's names are known by the backend.
        source = (resolver.asking(backend=names[0]) if len(names) == 1 else resolver).target(target)
        turns = Turns(
            open_bench(target, given, named=True, load_limit=load_limit),
            chosen,
            settings,
            repeats,
            progress or (lambda _: None),
        )
        result = BenchResult(
            target=name_of(source),
            revision=source.revision,
            asked=_asked(given),
            processor=cpu_model(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=0.0,
            prompts=classes(chosen),
            max_new_tokens=settings.max_new_tokens,
            ignore_eos=settings.ignore_eos,
            temperature=settings.temperature,
            repeats=repeats,
            synthetic_acceptance=chance,
            rows=(),
        )
        result = _measured(turns, names, ks, result, against=against, save_to=save_to)
    if save_to is not None:
        result = result.model_copy(update={"notes": (*result.notes, *no_chart)})
        chart.save(result, save_to)
    return result


def _asked(given: LoadArguments) -> dict[str, Any]:
    """What the rows do not tell."""
    names = ("dtype", "device", "quantization", "exactness", "context_length", "trust_remote_code")
    arguments: dict[str, Any] = {**given}
    told = {name: arguments[name] for name in names if arguments[name] != DEFAULTS.get(name)}
    options = options_of(arguments["engine_options"])
    return {**told, "engine_options": options} if options else told


def _measured(
    turns: Turns,
    names: Sequence[str],
    ks: Sequence[AnyK] | Literal["sweep"] | None,
    result: BenchResult,
    *,
    against: str | None,
    save_to: Path | None,
) -> BenchResult:
    """Have the sides take turns, and put what they did into the result."""

    def so_far(*, interrupted: bool) -> BenchResult:
        rows = rows_of(turns, compares_outputs=result.synthetic_acceptance is None)
        return result.model_copy(
            update={
                "seconds": round(turns.seconds, 1),
                "rows": rows,
                "interrupted": interrupted,
                "notes": tuple(_notes(turns, rows, result.repeats, interrupted)),
            }
        )

    def keep() -> None:
        """For one who is killed; that the folder can no longer be written is said at the end."""
        if save_to is not None:
            with suppress(OSError):
                chart.write(so_far(interrupted=True), save_to)

    interrupted = False
    try:
        try:
            for name in names:
                turns.add(name, ks, upstream=against is not None)
            turns.run(keep)
        except KeyboardInterrupt:
            if not any(side.samples for side in turns.sides):
                raise
            interrupted = True
        found = so_far(interrupted=interrupted)
    finally:
        with suppress(PolydraftError):  # an engine that cannot be closed has been measured
            turns.bench.close()
    if not any(row.tokens_per_second for row in found.rows):
        raise BackendUnavailableError(
            f"Nothing could be measured for {result.target}. "
            + " ".join(f"{row.label}: {row.reason}" for row in found.rows if row.reason),
            "`polydraft doctor` shows more about each backend.",
        )
    return found


def _notes(turns: Turns, rows: Sequence[BenchRow], repeats: int, interrupted: bool) -> list[str]:
    notes = []
    if interrupted:
        made = f"{turns.repeats} of {repeats} repeats" if turns.repeats else "a part of the first repeat"
        notes.append(f"It was interrupted: this is what was measured so far, {made}.")
    if not turns.alternated:
        notes.append("Not all engines can be loaded at once, so they were measured one after the other.")
    notes += [f"upstream: {name}." for name in dict.fromkeys(row.upstream for row in rows if row.upstream)]
    whole = dict.fromkeys(
        side.group.backend for side in turns.sides if side.samples and not side.upstream and turns.runs_whole(side)
    )
    if whole:
        notes.append(
            f"Rounds are not split where the engine keeps its own loop, or runs them in one piece: {', '.join(whole)}."
        )
    if not any(row.method for row in rows):
        notes.append("No drafter was asked for or found: only plain decoding was measured.")
    if any(row.same_as_plain is False for row in rows):
        notes.append("Outputs differ: `polydraft verify` says whether by near ties or by a defect.")
    return notes


def _checked_ks(
    target: str | Path, given: Any, sweep_k: bool, arguments: Mapping[str, Any]
) -> Sequence[AnyK] | Literal["sweep"] | None:
    """The ks, each checked as ``load`` checks it; None: the recommended one."""
    name = "num_speculative_tokens"
    if given is None:
        return "sweep" if sweep_k else None
    if sweep_k:
        raise InvalidRequestError(
            f"`sweep_k=True` and `{name}={shown(given)}` both say which k to measure.",
            "Leave one of them out.",
            argument="sweep_k",
        )
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not listed:
        raise InvalidRequestError(f"`{name}` is an empty list.", "Give a k, or leave it out.", argument=name)
    for k in listed:
        checked_arguments(target, {**arguments, name: k})  # type: ignore[typeddict-item]
    return [k if k == "auto" else int(k) for k in dict.fromkeys(listed)]


def _checked_chance(given: object) -> float | None:
    if given is None:
        return None
    chance = as_float(given)
    if chance is None or not 0 <= chance <= 1:
        raise InvalidRequestError(
            f"`synthetic_acceptance={shown(given)}` is not a chance.",
            "Give a number from 0 to 1.",
            argument="synthetic_acceptance",
        )
    return chance


def _checked_temperature(given: object) -> float:
    temperature = as_float(given)
    if temperature is None or not 0 <= temperature <= 100:
        raise InvalidRequestError(
            f"`temperature={shown(given)}` is not a temperature.", "Give 0 or more.", argument="temperature"
        )
    return temperature


def _checked_repeats(given: object) -> int:
    repeats = as_int(given)
    if repeats is None or not 1 <= repeats <= 1000:
        raise InvalidRequestError(
            f"`repeats={shown(given)}` is not a number of repeats.", "Give 1 to 1000.", argument="repeats"
        )
    return repeats


def _check_together(against: object, settings: CallSettings, drafter: object) -> None:
    """Refuse what cannot be measured together."""
    if against not in {None, "upstream"}:
        raise InvalidRequestError(
            f"`against={shown(against)}` is unknown.", "Give 'upstream', or leave it out.", argument="against"
        )
    if drafter is None and (against or settings.synthetic_acceptance is not None):
        name = "against" if against else "synthetic_acceptance"
        raise InvalidRequestError(
            f"`drafter=None` is plain decoding, and `{name}` is about drafts.", "Leave one of them out.", argument=name
        )
    if against and settings.synthetic_acceptance is not None:
        raise InvalidRequestError(
            "`synthetic_acceptance` sets what polydraft accepts, and not what the engine's own loop does.",
            "Leave it or `against='upstream'` out.",
            argument="synthetic_acceptance",
        )
    if against and settings.temperature:
        raise InvalidRequestError(
            "The engine's own loop is measured greedily: its samples are others.",
            "Leave out `temperature`, or `against='upstream'`.",
            argument="temperature",
        )
