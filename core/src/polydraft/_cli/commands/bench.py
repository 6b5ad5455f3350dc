"""``polydraft bench``: speculative decoding beside plain decoding, in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.loading import load_arguments
from polydraft._cli.problems import INTERRUPTED
from polydraft._cli.streams import claim_output, console_for
from polydraft._cli.waiting import waiting_for
from polydraft._flags import FLAGS, in_flags

__all__ = ["bench"]

_PANEL = opt.MEASURING


def bench(
    *,
    loading: dict[str, Any],
    sweep_k: Annotated[
        bool,
        typer.Option(
            *FLAGS["sweep_k"],
            help="Measure every k from 1 to 8, or to twice the recommended one. -k 2,4,auto names some.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            *FLAGS["against"],
            metavar="upstream",
            help="upstream: the engine's own speculative decoding takes part, with the same weights and k.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    synthetic_acceptance: Annotated[
        float | None,
        typer.Option(
            *FLAGS["synthetic_acceptance"],
            metavar="CHANCE",
            help="Accept each draft with this chance, whatever the target chooses: for random weights. The output is "
            "then no text of the model, and the result says so.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    prompts: opt.MeasuredPrompts = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            *FLAGS["max_new_tokens"], metavar="N", help="Tokens of each output at most.", rich_help_panel=_PANEL
        ),
    ] = 64,
    ignore_eos: Annotated[
        bool, typer.Option(*FLAGS["ignore_eos"], help="Do not end outputs early.", rich_help_panel=_PANEL)
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", metavar="T", help="0: greedy. Else repeat i has the seed i.", rich_help_panel=_PANEL
        ),
    ] = 0.0,
    repeats: Annotated[
        int,
        typer.Option(
            *FLAGS["repeats"],
            metavar="N",
            help="How often each prompt counts, after a round that does not.",
            rich_help_panel=_PANEL,
        ),
    ] = 5,
    load_limit: opt.LoadLimit = None,
    save_to: Annotated[
        Path | None,
        typer.Option(
            *FLAGS["save_to"],
            metavar="FOLDER",
            help="Write bench.json and a chart, bench.png and .svg, there; the chart needs polydraft\\[charts].",
            rich_help_panel="Output",
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Measure speculative decoding beside plain decoding, on any backend and pair.

    All sides decode the same prompts in alternating order, after a round that does not count: tokens/s, time to the
    first token, the parts of a round, acceptance by position, memory; medians, with the slowest and the fastest repeat.
    --backend names one, or several with commas; -k likewise. Ctrl+C ends it early and shows what was measured so far.

    Do nothing else on the machine meanwhile. `polydraft tune` chooses an engine, a drafter and k by measurement.
    """
    from polydraft._cli.render.benchmark import bench_json, bench_summary

    output = claim_output()
    import polydraft
    from polydraft.errors import NotSavedError

    target, arguments = load_arguments(loading)
    names = [name.strip() for name in arguments["backend"].split(",") if name.strip()]
    if len(names) > 1:
        arguments |= {"backend": "auto", "backends": names}
    arguments["num_speculative_tokens"] = _ks(arguments["num_speculative_tokens"])
    if load_limit is not None:
        arguments["load_limit"] = load_limit
    unsaved: NotSavedError | None = None
    with waiting_for("Looking for the backend") as waiting:

        def show(sentence: str) -> None:
            waiting.line(in_flags(sentence))
            waiting.step(sentence)

        try:
            found = polydraft.bench(
                target,
                sweep_k=sweep_k,
                against=against,  # type: ignore[arg-type]
                synthetic_acceptance=synthetic_acceptance,
                prompts=prompts,
                max_new_tokens=max_new_tokens,
                ignore_eos=ignore_eos,
                temperature=temperature,
                repeats=repeats,
                save_to=save_to,
                progress=show,
                **arguments,
            )
        except NotSavedError as error:  # shown all the same
            found, unsaved = error.result, error
    if json:
        print(bench_json(found), file=output, flush=True)
    else:
        console_for(output).print(bench_summary(found))
    if unsaved is not None:
        raise unsaved
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def _ks(given: Any) -> Any:
    """``2,4,auto`` as a list; what is no number is for the library to judge."""
    if not isinstance(given, str) or "," not in given:
        return given
    listed = [text.strip() for text in given.split(",") if text.strip()]
    return [int(text) if text.isdecimal() else text for text in listed]
