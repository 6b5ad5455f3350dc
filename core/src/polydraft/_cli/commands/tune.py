"""``polydraft tune``: which backend, drafter and k are fastest here; ``load`` then uses them."""

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
from polydraft.errors import InvalidRequestError

__all__ = ["tune"]

_PANEL = opt.MEASURING


def tune(
    *,
    context: typer.Context,
    loading: dict[str, Any],
    seconds: Annotated[
        float | None,
        typer.Option(
            *FLAGS["seconds"],
            metavar="SECONDS",
            help="Measure for this long; the starts of engines come on top. Default: 240.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    prompts: opt.MeasuredPrompts = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            *FLAGS["max_new_tokens"],
            metavar="N",
            help="Tokens of each output. Default: 64, or fewer where the machine is slow.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    load_limit: opt.LoadLimit = None,
    keep: Annotated[
        bool,
        typer.Option("--keep/--no-keep", help="Keep the result: loading then uses it.", rich_help_panel=_PANEL),
    ] = True,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget", help="Measure nothing: remove what is kept of --model, or of all.", rich_help_panel=_PANEL
        ),
    ] = False,
    save_to: Annotated[
        Path | None,
        typer.Option(
            *FLAGS["save_to"],
            metavar="FOLDER",
            help="Write tuning.json and a chart, tuning.png and .svg, there; the chart needs polydraft\\[charts].",
            rich_help_panel="Output",
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Measure which backend, drafter and k are fastest for a model on this machine, and use them from then on.

    Each backend that can run here is measured with and without speculation, each in a process of its own; --backend
    names one, or several with commas. Candidates take turns; what is surely slower is dropped, and what fails is a line
    with its reason. Ctrl+C ends it early and shows what was measured so far, which is not kept.

    Loading with `--backend auto` and without `-k` then uses the fastest while weights, versions and hardware stay the
    same. Speculation that was slower than plain decoding is then off. Do nothing else on the machine meanwhile.
    """
    from polydraft._cli.render.tuning import tuning_json, tuning_summary

    output = claim_output()
    if forget:
        if others := opt.given_flags(context, *opt.loading_options(), "forget", "json", "verbose", "debug"):
            raise InvalidRequestError(
                f"{', '.join(others)} cannot be given with --forget, which measures nothing.", "Leave it out."
            )
        count = _forget(loading)
        if json:
            print(f'{{"removed": {count}}}', file=output, flush=True)
        else:
            print(f"Removed: {count}", file=output, flush=True)
        return
    import polydraft
    from polydraft.errors import NotSavedError

    target, arguments = load_arguments(loading)
    names = [name.strip() for name in arguments["backend"].split(",") if name.strip()]
    if len(names) > 1:
        arguments |= {"backend": "auto", "backends": names}
    given: dict[str, Any] = {
        "seconds": seconds,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "load_limit": load_limit,
    }
    given = {name: value for name, value in given.items() if value is not None}
    unsaved: NotSavedError | None = None
    with waiting_for("Looking for backends") as waiting:

        def show(sentence: str) -> None:
            waiting.line(in_flags(sentence))
            waiting.step(sentence)

        try:
            found = polydraft.tune(target, keep=keep, save_to=save_to, progress=show, **given, **arguments)
        except NotSavedError as error:  # shown all the same
            found, unsaved = error.result, error
    if json:
        print(tuning_json(found), file=output, flush=True)
    else:
        console_for(output).print(tuning_summary(found))
    if unsaved is not None:
        raise unsaved
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def _forget(loading: dict[str, Any]) -> int:
    from polydraft._load_arguments import checked_arguments
    from polydraft._measuring.identity import name_of
    from polydraft._registry.resolver import Resolver
    from polydraft._tune._store import forget
    from polydraft.errors import PolydraftError

    if loading["target"] is None:
        return forget()
    target, arguments = load_arguments(loading)
    try:
        name = name_of(Resolver(checked_arguments(target, arguments)).target(target))  # type: ignore[arg-type]
    except PolydraftError:  # it is not there any more
        name = str(Path(target).expanduser().resolve()) if Path(target).is_absolute() else target
    return forget(name)
