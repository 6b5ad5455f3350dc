"""``polydraft verify``: is the speculative output the plain one, here, with this model?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from polydraft._cli import options as opt
from polydraft._cli.loading import LoadOptions, model_or_builtin, parse_engine_options
from polydraft._cli.problems import FAILURE, USAGE, describe, tell
from polydraft._cli.streams import claim_output, console_for, diagnostics

if TYPE_CHECKING:
    from polydraft.contract import RunningInfo
    from polydraft.verification._records import CheckedCase

__all__ = ["NOT_CHECKED", "verify"]

NOT_CHECKED = 3
"""Neither identical nor not: loading failed, say."""


def verify(
    *,
    model: opt.Model = None,
    drafter: opt.DrafterOption = None,
    backend: opt.BackendOption = "auto",
    k: opt.K = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    context_length: opt.ContextLength = None,
    exactness: opt.ExactnessOption = "standard",
    engine_option: opt.EngineOption = None,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            "-t",
            metavar="SECONDS",
            help="Check for so long, loading not counted. Default: one pass over the prompts, at most a minute.",
            rich_help_panel="How it checks",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="A near tie is a failure, too.", rich_help_panel="How it checks"),
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep",
            help="Keep the result for load(verified=...).",
            rich_help_panel="How it checks",
        ),
    ] = True,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Check on this machine that speculation does not change a model's output, and say what it gains.

    The same prompts are decoded plainly and with speculation: greedily, with seeds where the backend repeats them, and
    past the sliding window if there is time. A difference is a near tie only if both tokens lie within the numeric
    noise and the same prefix flips without any drafter, too. The result holds for these models, versions, dtype and
    hardware.

    Exit codes: 0 the output is the same (near ties, which are counted apart, allowed unless --strict), 1 it is not, 2
    wrong usage, 3 it could not be checked.
    """
    from polydraft._cli.render.verification import verification_json, verification_summary
    from polydraft.verification._command import verify as check

    output = claim_output()
    try:
        wish = LoadOptions(model, drafter)
        found = check(
            model_or_builtin(model),
            time_limit=time_limit,
            keep=keep,
            loaded=_tell_running,
            progress=_tell_case,
            drafter=wish.load_drafter,
            backend=backend,
            num_speculative_tokens=k,
            dtype=dtype,
            device=device,
            context_length=context_length,
            exactness=exactness,
            engine_options=parse_engine_options(engine_option) or None,
            revision=revision,
            local_files_only=offline,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        if describe(error).exit_code == USAGE:
            raise
        tell(error, debug=debug)
        raise typer.Exit(NOT_CHECKED) from error
    if json:
        output.write(verification_json(found) + "\n")
        output.flush()
    else:
        console_for(output).print(verification_summary(found))
    if not found.passes or (strict and found.verdict != "EXACT"):
        raise typer.Exit(FAILURE)


def _tell_running(running: RunningInfo) -> None:
    from polydraft._cli.render.generation import describe_running

    for line in describe_running(running):
        diagnostics().print(line, style="dim")


def _tell_case(case: CheckedCase) -> None:
    from polydraft._cli.render.verification import case_line

    print(case_line(case), file=sys.stderr, flush=True)
