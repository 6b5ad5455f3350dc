"""The console script ``polydraft``: the commands put together, and how their errors end the process."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from polydraft._cli.commands import engines
from polydraft._cli.commands.backends import backends
from polydraft._cli.commands.batch import batch
from polydraft._cli.commands.bench import bench
from polydraft._cli.commands.cache import cache
from polydraft._cli.commands.chat import chat
from polydraft._cli.commands.create import create_command
from polydraft._cli.commands.doctor import doctor
from polydraft._cli.commands.generate import generate
from polydraft._cli.commands.pairs import pairs
from polydraft._cli.commands.serve import serve
from polydraft._cli.commands.tune import tune
from polydraft._cli.commands.verify import verify
from polydraft._cli.options import CommandState, Debug, Verbose, takes_options
from polydraft._cli.problems import BROKEN_PIPE, INTERRUPTED, SUCCESS, report, show_warnings
from polydraft._cli.streams import abandon_output, output_closed
from polydraft._flags import FLAGS
from polydraft._presentable import presentable
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["app", "main", "run"]

_HELP_OPTIONS = ["--help", "-h"]
_COMPLETION = "_POLYDRAFT_COMPLETE"
"""The variable by which a shell asks for completions."""


_MAY_BE_EMPTY = {"words", "prompt", "prompt_token_ids", "system", *FLAGS} - {"target", "save_to", "prompts"}
"""Prompts, and arguments of the library, which refuses them itself, but of a path sees the current folder."""


class _Command(TyperCommand):
    """A command whose usage errors know it, and which refuses empty values: they come of unset shell variables."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The rest of the arguments, as click has it."""
        try:
            rest = super().parse_args(ctx, [*args])
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:  # the parser does not say whose option lacks its value
                error.ctx = ctx  # type: ignore[attr-defined]
            raise
        if not ctx.resilient_parsing:
            _refuse_empty(self, self.make_parser(ctx).parse_args(args=[*args])[0])
        return rest


def _refuse_empty(command: TyperCommand, given: Mapping[str, Any]) -> None:
    """``given`` has what was typed: a path that is empty would be the current folder."""
    for option in command.params:
        value = given.get(option.name or "")
        if option.name not in _MAY_BE_EMPTY and (value == "" or (isinstance(value, list) and "" in value)):
            is_option = option.param_type_name == "option"
            name = option.opts[0] if is_option else (option.metavar or option.opts[0]).strip("[]")
            raise InvalidRequestError(f"{name} is empty.", "Give a value, or leave it out.")


class _Commands(TyperGroup):
    """The commands, and a group for each backend whose server takes models; plugins are asked only for that one."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, or None; the types are click's, of which typer has a copy of its own or not."""
        found = super().get_command(ctx, cmd_name)
        create = create_command(cmd_name) if found is None else None
        if create is None:
            return found
        group = typer.Typer(help=f"Models of the server of the backend {cmd_name}.")
        group.callback()(_group_root)
        group.command("create", cls=_Command, help=_help(create.__doc__))(takes_options(create))
        return typer.main.get_command(group)


def _group_root() -> None:
    """A group of commands, even if it has one only."""


app = typer.Typer(
    name="polydraft",
    cls=_Commands,
    help="Speculative decoding over many engines: faster generation, the same output.",
    epilog="Exit codes: 0 success, 1 failure, 2 wrong usage, 3 could not be compared (verify), 130 interrupted.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": _HELP_OPTIONS},
)


def _version(value: bool) -> None:
    if value:
        from polydraft._cli.versions import version_lines

        for line in version_lines():
            typer.echo(presentable(line))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the versions, those of engines too."),
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Options before the command; all act by their callbacks."""


def _help(docstring: str | None) -> str:
    """Its paragraphs in one line each: typer would keep the source's line breaks, whatever the terminal's width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (docstring or "").split("\n\n"))


for _command in (generate, chat, verify, tune, bench, serve, batch, backends, pairs, cache, doctor):
    app.command(cls=_Command, help=_help(_command.__doc__))(takes_options(_command))

_engines = typer.Typer(help="Engines in environments of their own: list, install, update or remove them.")


@_engines.callback(invoke_without_command=True)
def _engines_root(context: typer.Context) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        engines.COMMANDS["list"](json=False)


for _name, _action in engines.COMMANDS.items():
    _engines.command(_name, cls=_Command, help=_help(_action.__doc__))(takes_options(_action))
app.add_typer(_engines, name="engines")


def run(arguments: Sequence[str]) -> int:
    """Run one command line (what follows ``polydraft``) and return its exit code; errors are reported, never raised."""
    state = CommandState()
    try:
        if sys.stdout is None and (not arguments or not {*_HELP_OPTIONS, "--version"}.isdisjoint(arguments)):
            raise output_closed()
        # Not the command's own main(): that would report errors in its own way.
        command = typer.main.get_command(app)
        _show_no_types_of_flags(command)
        with command.make_context("polydraft", list(arguments) or ["--help"], obj=state) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    # The reader has left, as in ``| head``: no message, and the exit code that shells expect.
    except BrokenPipeError:
        abandon_output()
        return BROKEN_PIPE
    except SystemExit as leave:
        if not isinstance(leave.__context__, BrokenPipeError):
            raise
        return BROKEN_PIPE  # of rich, which writes the help
    except Exception as error:
        if _of_interrupt(error):
            print("Interrupted.", file=sys.stderr)
            return INTERRUPTED
        code = report(error, debug=state.debug)
        if isinstance(error, OSError):
            abandon_output()  # it may be what cannot be written: the interpreter would try again at exit
        return code
    return SUCCESS


def _of_interrupt(error: BaseException | None) -> bool:
    """Whether it comes of Ctrl+C: Python 3.11 makes another error of one while a class is defined, as in an import."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _of_interrupt(error.__cause__))


def _show_no_types_of_flags(command: Any) -> None:
    """Flags take no value, but ``--help`` of some versions of typer shows ``<bool>`` behind them."""
    context = command.context_class(command, help_option_names=_HELP_OPTIONS)  # the option is made once
    for option in (*command.params, command.get_help_option(context)):
        if getattr(option, "is_flag", False) and option.metavar is None:
            option.metavar = ""
    for inner in getattr(command, "commands", {}).values():
        _show_no_types_of_flags(inner)


def _complete() -> None:
    """Answer a shell. bash ends words at colons: they are joined again, and answers lack what is typed already."""
    if os.environ[_COMPLETION] != "complete_bash":
        app(prog_name="polydraft")
    words: list[str] = []
    colon = False
    for word in os.environ.get("COMP_WORDS", "").split("\n"):
        if words and (colon or word == ":"):
            words[-1] += word
        else:
            words.append(word)
        colon = word == ":"
    before, _, _ = words[-1].rpartition(":")
    os.environ.update(COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))
    answers = io.StringIO()
    try:
        with contextlib.redirect_stdout(answers):
            app(prog_name="polydraft")
    finally:
        for answer in answers.getvalue().splitlines():
            print(answer.removeprefix(f"{before}:") if before else answer)


def main() -> None:
    """Entry point of the console script."""
    show_warnings()
    # huggingface_hub's warnings are mostly of retries; what comes of them is reported in one line.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if _COMPLETION in os.environ:  # a shell asks what may come next
        _complete()
    code = run(sys.argv[1:])
    gc.freeze()  # at exit Python would look through all objects of an engine, for a second
    sys.exit(code)
