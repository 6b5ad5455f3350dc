"""``polydraft generate``: one prompt, one answer, and the statistics of speculation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.comparison import compare_with_plain, warm_up
from polydraft._cli.loading import checked_settings, load_arguments, open_session
from polydraft._cli.problems import FAILURE
from polydraft._cli.prompts import read_prompt
from polydraft._cli.streams import claim_output, console_for, diagnostics, is_terminal
from polydraft._cli.waiting import waiting_for_answer
from polydraft.errors import EngineError, InvalidRequestError, SpeculationUnavailableError

if TYPE_CHECKING:
    from polydraft._cli.render.answer import AnswerView
    from polydraft._session.session import Session
    from polydraft.contract import GenerationResult, Prompt, RunningInfo

__all__ = ["generate"]


def generate(
    *,
    words: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt, as raw text.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt, as an option.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="The prompt from a file; - is standard input.")
    ] = None,
    prompt_token_ids: Annotated[
        str | None, typer.Option("--prompt-token-ids", metavar="1,2,3", help="The prompt as token ids, unchanged.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message, with --chat.")] = None,
    loading: dict[str, Any],
    plain: Annotated[
        bool, typer.Option("--plain", help="Decode without speculation.", rich_help_panel="What runs")
    ] = False,
    settings: dict[str, Any],
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Decode the same prompt plainly too, after short warm-up runs, and compare output and speed. A near "
            "tie is explained; any other difference is exit code 1.",
            rich_help_panel="Output",
        ),
    ] = False,
    runs: Annotated[
        int,
        typer.Option(
            "--runs",
            metavar="N",
            min=1,
            help="With --compare: decode N times each way, in turn, and show the median speeds.",
            rich_help_panel="Output",
        ),
    ] = 1,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour the accepted draft tokens.", rich_help_panel="Output")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Generate text, and report what speculation did.

    The answer goes to standard output. A small table follows; where standard output is not a terminal, the table goes
    to standard error, so that a pipe or a file gets the text only.
    """
    from polydraft._cli.render.answer import AnswerView
    from polydraft._cli.render.generation import generation_json, summary, without_text

    if plain and compare:
        raise InvalidRequestError("--plain and --compare exclude one another.", "--compare decodes plainly too.")
    if runs > 1 and not compare:
        raise InvalidRequestError("--runs needs --compare.", "Add --compare, or leave --runs out.")
    if show_drafts and json:
        raise InvalidRequestError("--show-drafts and --json exclude one another.", "Leave one out.")
    what = read_prompt(prompt, prompt_file, prompt_token_ids, argument=words, chat=chat, system=system)
    given = checked_settings(settings)
    target, arguments = load_arguments(loading, plain=plain)
    if show_drafts and (plain or arguments["drafter"] is None):
        raise InvalidRequestError(
            "--show-drafts has no effect: nothing is drafted.", "Leave it out, or give a drafter."
        )
    if compare and arguments["drafter"] is None:
        raise InvalidRequestError(
            "--compare has nothing to compare with --drafter none, which is plain decoding.", "Leave one of them out."
        )
    output = claim_output()
    with open_session(target, arguments) as session:
        if compare:
            _refuse_plain(session.running)
            warm_up(session, what, given)
        view = None if json else AnswerView(output, show_drafts=show_drafts)
        if view is not None:
            view.legend()
        how = {**given, "speculate": "off"} if plain else given
        try:
            result, rounds = _stream_answer(session, what, how, view)
        # After Ctrl+C, too: a message must not continue the line of the answer.
        except BaseException:
            if view is not None:
                view.break_off()
            raise
        if view is not None:
            view.end()
        comparison = compare_with_plain(session, what, given, (result, rounds), arguments, runs) if compare else None

    if json:
        print(generation_json(result, comparison), file=output, flush=True)
    else:
        console = console_for(output) if is_terminal(output) else diagnostics()
        if said := without_text(result, thinking_shown=is_terminal(output)):
            console.print(said, style="yellow")
        console.print(summary(result, comparison))
    if comparison is not None and not comparison.passes:
        raise typer.Exit(FAILURE)


def _refuse_plain(running: RunningInfo) -> None:
    if running.method is None:
        why = running.speculation_off.message if running.speculation_off else "No drafter is loaded."
        raise SpeculationUnavailableError(f"There is nothing to compare, speculation is off: {why}", "Give a drafter.")


def _stream_answer(
    session: Session, prompt: Prompt, settings: dict[str, Any], view: AnswerView | None
) -> tuple[GenerationResult, list[int]]:
    """Generate, showing each chunk as it is generated; also how many tokens each round gave."""
    stream = session.stream(prompt, **settings)
    rounds: list[int] = []
    try:
        with waiting_for_answer(view, session) as show:
            for chunk in stream:
                show(chunk)
                rounds.append(len(chunk.token_ids or ()))
    finally:
        stream.close()
    if stream.result is None:
        raise EngineError("The session ended a stream without a result.", "Report it to the plugin's author.")
    return stream.result, rounds
