"""``polydraft generate``: one prompt, one answer, and what speculation did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.comparison import compare_with_plain, warm_up
from polydraft._cli.loading import LoadOptions, check_settings, open_session, parse_engine_options, parse_numbers
from polydraft._cli.problems import FAILURE
from polydraft._cli.prompts import read_prompt
from polydraft._cli.streams import claim_output, console_for, diagnostics, is_terminal
from polydraft.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft._session.session import Session
    from polydraft.contract import Chunk, GenerationResult, Prompt

__all__ = ["generate", "stream_answer"]


def generate(
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt, taken raw.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="The prompt from a file; - is standard input.")
    ] = None,
    prompt_token_ids: Annotated[
        str | None, typer.Option("--prompt-token-ids", metavar="1,2,3", help="The prompt in token ids, as they are.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message, with --chat.")] = None,
    model: opt.Model = None,
    drafter: opt.DrafterOption = None,
    backend: opt.BackendOption = "auto",
    k: opt.K = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Decode without speculation.", rich_help_panel="What runs"),
    ] = False,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    context_length: opt.ContextLength = None,
    exactness: opt.ExactnessOption = "standard",
    engine_option: opt.EngineOption = None,
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    max_new_tokens: opt.MaxNewTokens = None,
    min_new_tokens: opt.MinNewTokens = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    presence_penalty: opt.PresencePenalty = None,
    frequency_penalty: opt.FrequencyPenalty = None,
    logit_bias: opt.LogitBias = None,
    ban_token: opt.BanToken = None,
    force_token: opt.ForceToken = None,
    acceptance: opt.AcceptanceOption = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    ignore_eos: opt.IgnoreEos = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Decode the same prompt plainly too, after short warm-up runs: whether the output is the same, and "
            "both speeds. A near tie is explained; any other difference is exit code 1.",
            rich_help_panel="Output",
        ),
    ] = False,
    show_drafts: Annotated[
        bool,
        typer.Option("--show-drafts", help="Colour the accepted draft tokens.", rich_help_panel="Output"),
    ] = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Generate text, and say what speculation did.

    The answer goes to standard output. A small table follows; where standard output is no terminal, the table goes to
    standard error, so that a pipe or a file gets the text only.
    """
    from polydraft._cli.render.answer import AnswerView
    from polydraft._cli.render.generation import generation_json, summary

    if plain and compare:
        raise InvalidRequestError("--plain and --compare exclude one another.", "--compare decodes plainly too.")
    if show_drafts and json:
        raise InvalidRequestError("--show-drafts and --json exclude one another.", "Leave one out.")
    what = read_prompt(prompt, prompt_file, prompt_token_ids, chat=chat, system=system)
    settings = check_settings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=parse_numbers("--logit-bias", logit_bias, float),
        banned_token_ids=tuple(ban_token) if ban_token else None,
        forced_token_ids=parse_numbers("--force-token", force_token, int),
        acceptance=acceptance,
        seed=seed,
        stop=tuple(stop) if stop else None,
        ignore_eos=ignore_eos,
    )
    wish = LoadOptions(
        model,
        drafter,
        plain,
        {
            "backend": backend,
            "num_speculative_tokens": k,
            "dtype": dtype,
            "device": device,
            "context_length": context_length,
            "exactness": exactness,
            "engine_options": parse_engine_options(engine_option) or None,
            "revision": revision,
            "local_files_only": offline,
            "trust_remote_code": trust_remote_code,
        },
    )
    output = claim_output()
    with open_session(wish) as session:
        if compare:
            warm_up(session, what, settings)
        view = None if json else AnswerView(output, show_drafts=show_drafts)
        if view is not None:
            view.legend()
        how = {**settings, "speculate": "off"} if plain else settings
        try:
            result = stream_answer(session, what, how, view.chunk if view else None)
        except BaseException:
            if view is not None:
                view.break_off()
            raise
        if view is not None:
            view.end()
        loaded = {"drafter": wish.load_drafter, **wish.options}
        comparison = compare_with_plain(session, what, settings, result, loaded) if compare else None

    if json:
        output.write(generation_json(result, comparison) + "\n")
        output.flush()
    else:
        console = console_for(output) if is_terminal(output) else diagnostics()
        console.print(summary(result, comparison))
    if comparison is not None and not comparison.passes:
        raise typer.Exit(FAILURE)


def stream_answer(
    session: Session, prompt: Prompt, settings: dict[str, Any], show: Callable[[Chunk], None] | None
) -> GenerationResult:
    """Generate, showing every chunk as it comes.

    Args:
        session: The session.
        prompt: The prompt.
        settings: Arguments of ``Session.stream``.
        show: What to do with a chunk; None: nothing.
    """
    if show is None:
        return session.generate(prompt, **settings)
    stream = session.stream(prompt, **settings)
    try:
        for chunk in stream:
            show(chunk)
    finally:
        stream.close()
    if stream.result is None:
        raise EngineError("The session ended a stream without a result.", "Tell the plugin's author.")
    return stream.result
