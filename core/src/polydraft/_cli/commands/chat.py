"""``polydraft chat``: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.loading import checked_settings, load_arguments, open_session
from polydraft._cli.problems import report
from polydraft._cli.prompts import given_text, read_text
from polydraft._cli.streams import claim_output, diagnostics, is_terminal
from polydraft.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from polydraft._cli.conversation import Conversation
    from polydraft._cli.render.answer import AnswerView

__all__ = ["chat"]

_COMMANDS = "/exit ends, /reset forgets the conversation, Ctrl-C cancels an answer."


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
    """Chat with a model. Thinking is shown dimmed; Ctrl-C cancels the current answer only."""
    from polydraft._cli.conversation import Conversation
    from polydraft._cli.render.answer import AnswerView
    from polydraft._cli.render.generation import describe_running

    given = checked_settings(settings)
    target, arguments = load_arguments(loading)
    output = claim_output()
    with open_session(target, arguments) as session:
        if think:
            given["chat_template_kwargs"] = {"enable_thinking": True}
        view = AnswerView(output, show_drafts=show_drafts)
        console = diagnostics()
        for line in (*describe_running(session.running), _COMMANDS):
            console.print(line, style="dim")
        view.legend()
        system = None if system is None else given_text("--system", system)
        _converse(Conversation(session, given, system), view, debug=debug)


def _converse(conversation: Conversation, view: AnswerView, *, debug: bool) -> None:
    """Read and answer until the user leaves."""
    from polydraft._cli.render.generation import one_line

    while True:
        try:
            message = _read()
        except InvalidRequestError as error:
            if not isinstance(error.__cause__, UnicodeError):
                raise
            # The next line may be UTF-8.
            report(error, debug=debug)
            continue
        if message is None or message in {"/exit", "/quit"}:
            return
        if message == "/reset":
            conversation.reset()
            continue
        if message.startswith("/"):
            diagnostics().print(_COMMANDS, style="dim")
            continue
        if not message:
            continue
        try:
            result = conversation.say(message, view.chunk)
        except (InvalidRequestError, UnsupportedError) as error:
            # The conversation continues: the message can be changed and sent again.
            report(error, debug=debug)
            continue
        finally:
            view.end()
        if result is not None:
            diagnostics().print(one_line(result), style="dim")


def _read() -> str | None:
    """The next message, stripped; None at the end of input."""
    if not is_terminal(sys.stdin):
        if sys.stdin is None or sys.stdin.closed:
            return None
        # Bytes: a pipe is UTF-8 whatever the locale. A replaced sys.stdin may have no buffer.
        whole = hasattr(sys.stdin, "buffer")
        line = read_text(sys.stdin.buffer, "The message", line=True) if whole else sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.suppress(ImportError):  # not every build of Python has it
        import readline  # noqa: F401 - gives input() line editing and a history
    while True:
        try:
            # input() writes its prompt to sys.stdout, which leads to standard error by now.
            return given_text("The message", input("> ").strip())
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(f"\n{_COMMANDS}", file=sys.stderr)
