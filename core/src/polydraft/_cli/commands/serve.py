"""``polydraft serve``: print and run an engine's own server for a pair."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polydraft._cli.loading import load_arguments
from polydraft._cli.streams import claim_output, is_terminal
from polydraft._presentable import presentable
from polydraft.secrets import MASK, Secret, revealed

if TYPE_CHECKING:
    from polydraft.contract import ServerCommand

__all__ = ["serve"]


def serve(
    *,
    loading: dict[str, Any],
    plain: Annotated[bool, typer.Option("--plain", help="Serve without speculation.")] = False,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on. Other machines can reach any but the loopback address.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    print_only: Annotated[bool, typer.Option("--print", help="Print the command, and do not run it.")] = False,
) -> None:
    """Serve a pair over HTTP with the engine's own server: the command is printed, then run.

    Pair and versions are checked as for generate. With --print, standard output is the command alone. The exit code
    is the server's.
    """
    from polydraft._load import prepare
    from polydraft.engine_parts.serving import check_port

    target, arguments = load_arguments(loading, plain=plain)
    prepared = prepare(target, **arguments)
    command = prepared.backend.server_command(prepared.request, host=host, port=port)
    if print_only:
        output, line = claim_output(), shown(command)
        print(presentable(line) if is_terminal(output) else line, file=output, flush=True)
        return
    check_port(host, port)
    typer.echo(presentable(shown(command)), err=True)
    environment = {**os.environ, **revealed(command.environment)}
    if os.name == "posix":  # this process becomes the server: a signal to it leaves none behind
        # exec does not flush Python's buffers.
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(command.arguments[0], command.arguments, environment)
    raise typer.Exit(subprocess.run(command.arguments, env=environment, check=False).returncode)


def shown(command: ServerCommand) -> str:
    """The command as it is typed into a shell, which reads a secret from where it is."""
    settings = []
    for name, value in command.environment.items():
        if not isinstance(value, Secret):
            settings.append(f"{name}={shlex.quote(value)}")
        elif value.shell != f"${name}":  # the server inherits that one
            settings.append(f'{name}="{value.shell or MASK}"')
    return " ".join([*settings, shlex.join(command.arguments)])
