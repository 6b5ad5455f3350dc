"""``polydraft verify``: is the speculative output the plain one, here, with this model?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.loading import load_arguments
from polydraft._cli.problems import FAILURE, USAGE, describe, report
from polydraft._cli.streams import abandon_output, claim_output, console_for
from polydraft._cli.waiting import waiting_for
from polydraft._flags import FLAGS
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from polydraft.contract import RunningInfo

__all__ = ["verify"]

_NOT_CHECKED = 3
"""It could not be checked, for example because loading failed; or the result could not be written."""


def verify(
    *,
    loading: dict[str, Any],
    time_limit: Annotated[
        float | None,
        typer.Option(
            *FLAGS["time_limit"],
            metavar="SECONDS",
            help="Check for this long, loading not counted. Default: one pass over the prompts, at most a minute.",
            rich_help_panel="How it checks",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help="Your own prompts: plain text with lines of --- between them, .json or .jsonl. Default: code, prose, "
            "lists, a chat, and prompts longer than the sliding window.",
            rich_help_panel="How it checks",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A near tie is a failure, too.", rich_help_panel="How it checks")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep", help="Keep the result for load(verified=...).", rich_help_panel="How it checks"
        ),
    ] = True,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Check on this machine that speculation does not change a model's output, and say what it gains.

    The same prompts are decoded plainly and with speculation: greedily, with seeds where the backend repeats them, and
    past the sliding window if there is time. A difference is a near tie only if both tokens lie within the numeric
    noise and the same prefix flips without any drafter, too. The result holds for these weights, builds, dtype and
    hardware.

    Exit codes: 0 the output is the same (near ties, which are counted apart, allowed unless --strict), 1 it is not, 2
    wrong usage, 3 it could not be checked.
    """
    output = claim_output()
    try:
        with waiting_for("Starting") as waiting:
            from polydraft._cli.render.generation import describe_running
            from polydraft._cli.render.verification import case_line, verification_json, verification_summary
            from polydraft.verification._command import verify as check
            from polydraft.verification._run import DEFAULT_SECONDS

            target, arguments = load_arguments(loading)
            own = None if prompt_file is None else _own_prompts(prompt_file)
            waiting.step(f"Loading {target}")

            def loaded(running: RunningInfo) -> None:
                for line in describe_running(running):
                    waiting.line(line)
                until = time.monotonic() + (DEFAULT_SECONDS if time_limit is None else time_limit)
                waiting.step("Checking", lambda: until - time.monotonic())

            found = check(
                target,
                time_limit=time_limit,
                keep=keep,
                loaded=loaded,
                progress=lambda case: waiting.line(case_line(case)),
                prompts=own,
                **arguments,
            )
        if json:
            print(verification_json(found), file=output, flush=True)
        else:
            console_for(output).print(verification_summary(found))
    except BrokenPipeError:
        raise
    except Exception as error:
        if describe(error).exit_code == USAGE:
            raise
        report(error, debug=debug)
        if isinstance(error, OSError):
            abandon_output()
        raise typer.Exit(_NOT_CHECKED) from error
    if not found.passes or (strict and found.verdict != "EXACT"):
        raise typer.Exit(FAILURE)


def _own_prompts(file: Path) -> list[Any]:
    from polydraft._measuring.prompts import read_prompts

    try:
        return [one.prompt for one in read_prompts(file)]
    except InvalidRequestError as error:
        raise InvalidRequestError(f"--prompt-file: {error.message}", error.hint) from error
