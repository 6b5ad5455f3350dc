"""``polydraft chat``: a conversation on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.chat_commands import run_command
from polydraft._cli.chat_input import read_message, with_history
from polydraft._cli.loading import checked_settings, load_arguments, open_session
from polydraft._cli.problems import SUCCESS, report
from polydraft._cli.prompts import given_text
from polydraft._cli.streams import claim_output, diagnostics, is_terminal
from polydraft._cli.waiting import waiting_for_answer
from polydraft.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from polydraft._cli.conversation import Conversation
    from polydraft._cli.render.answer import AnswerView

__all__ = ["chat"]

_COMMANDS = "/exit ends, /help shows all commands, Ctrl-C cancels an answer."


def chat(
    *,
    loading: dict[str, Any],
    settings: dict[str, Any],
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    think: Annotated[
        bool, typer.Option("--think", help="Ask the model to think first (enable_thinking of its chat template).")
    ] = False,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour the accepted draft tokens.", rich_help_panel="Output")
    ] = False,
    debug: opt.Debug = False,
) -> None:
    """Chat with a model. Thinking is shown dimmed; Ctrl-C cancels the current answer only.

    /help shows the commands: settings on the fly, /reset, /save and others. What is typed is kept for the arrow keys of
    later chats, in the file chat_history of polydraft's state folder. From a pipe each line is a message; the exit code
    is not 0 if every one was refused.
    """
    from polydraft._cli.conversation import Conversation
    from polydraft._cli.render.answer import AnswerView
    from polydraft._cli.render.generation import describe_running

    given = checked_settings(settings)
    target, arguments = load_arguments(loading)
    if show_drafts and arguments["drafter"] is None:
        raise InvalidRequestError(
            "--show-drafts has no effect: nothing is drafted.", "Leave it out, or give a drafter."
        )
    output = claim_output()
    with open_session(target, arguments) as session, with_history():
        if think:
            given["chat_template_kwargs"] = {"enable_thinking": True}
        view = AnswerView(output, show_drafts=show_drafts)
        console = diagnostics()
        for line in (*describe_running(session.running), _COMMANDS):
            console.print(line, style="dim")
        view.legend()
        system = None if system is None else given_text("--system", system)
        if code := _converse(Conversation(session, given, system), view, debug=debug):
            raise typer.Exit(code)


def _converse(conversation: Conversation, view: AnswerView, *, debug: bool) -> int:
    """Read and answer until the user leaves. The exit code: an error's if every message of a pipe was refused."""
    from polydraft._cli.render.generation import one_line, without_text

    answered, code = is_terminal(sys.stdin), SUCCESS
    while True:
        try:
            message = read_message(_COMMANDS)
        except InvalidRequestError as error:
            if not isinstance(error.__cause__, UnicodeError):
                raise
            code = report(error, debug=debug)  # the next line may be UTF-8
            continue
        try:
            if message is None or message in {"/exit", "/quit"}:
                return SUCCESS if answered else code
            if message.startswith("/") and not message.startswith("//"):
                diagnostics().print(run_command(message, conversation), style="dim")
                continue
            if not message:
                continue
            with waiting_for_answer(view, conversation.session) as show:
                result = conversation.say(message.removeprefix("/") if message[:2] == "//" else message, show)
            answered = True
        except (InvalidRequestError, UnsupportedError) as error:
            # The conversation continues: the message can be changed and sent again.
            view.break_off()
            code = report(error, debug=debug)
            continue
        except BaseException:
            view.break_off()
            raise
        view.end()
        if result is not None:
            if said := without_text(result, thinking_shown=view.on_terminal):
                diagnostics().print(said, style="yellow")
            diagnostics().print(one_line(result), style="dim")
