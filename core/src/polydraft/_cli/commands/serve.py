"""``polydraft serve``: a pair over HTTP, with polydraft's own server or with the engine's."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.loading import checked_settings, load_arguments, open_session
from polydraft._cli.streams import claim_output, is_terminal
from polydraft._numbers import MOST_SECONDS
from polydraft._presentable import presentable
from polydraft.errors import InvalidRequestError, PolydraftError
from polydraft.secrets import MASK, Secret, revealed

if TYPE_CHECKING:
    from polydraft.contract import ServerCommand

__all__ = ["serve"]

_WHO, _MUCH, _OWN = "Who may use it", "How much at a time", "The engine's own server"


def serve(
    *,
    context: typer.Context,
    loading: dict[str, Any],
    plain: Annotated[bool, typer.Option("--plain", help="Serve without speculation.")] = False,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on. Others than the loopback address can be reached by other machines, and need a "
            "key.",
            rich_help_panel=_WHO,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any.", rich_help_panel=_WHO)
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="The key that requests must send. Default: the environment variable POLYDRAFT_API_KEY, if it is set.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="No key, whoever reaches the address.", rich_help_panel=_WHO)
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Web pages of this origin, scheme://host[:port], may use it; *: of any. May be repeated.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="What requests call the model. May be repeated. Default: the target's id.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            "--max-running",
            min=1,
            help="Generations at a time. Default: 64 where the engine batches them, 4 where it steps them in turn.",
            rich_help_panel=_MUCH,
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting", min=0, help="Generations that wait; more are told to come back.", rich_help_panel=_MUCH
        ),
    ] = 256,
    request_seconds: Annotated[
        float,
        typer.Option(
            "--request-seconds",
            min=1,
            max=MOST_SECONDS,
            help="Time limit of a generation, its wait included.",
            rich_help_panel=_MUCH,
        ),
    ] = 600.0,
    stop_seconds: Annotated[
        float,
        typer.Option(
            "--stop-seconds",
            min=0,
            max=MOST_SECONDS,
            help="Time for generations to end when it is stopped.",
            rich_help_panel=_MUCH,
        ),
    ] = 30.0,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-body-bytes",
            min=1,
            help="Largest request. Default: 1 MiB, and 16 bytes for each token of the context.",
            rich_help_panel=_MUCH,
        ),
    ] = None,
    settings: dict[str, Any],
    own_server: Annotated[
        bool,
        typer.Option(
            "--own-server", help="Run the engine's own server, after printing its command.", rich_help_panel=_OWN
        ),
    ] = False,
    print_only: Annotated[
        bool,
        typer.Option("--print", help="With --own-server: print the command, and do not run it.", rich_help_panel=_OWN),
    ] = False,
) -> None:
    """Serve a pair over HTTP: OpenAI's API over any backend, with draft statistics in every answer.

    Settings such as --temperature are the defaults of requests that leave them out. Ctrl+C and SIGTERM stop it once
    the answers under way are finished.

    With --own-server the engine's own server runs instead: pair and versions are checked as for generate, the command
    is printed, then run, and the exit code is the server's.
    """
    if own_server:
        taken = opt.loading_options("isolation")
        if others := opt.given_flags(
            context, *taken, "plain", "host", "port", "own_server", "print_only", "verbose", "debug"
        ):
            raise InvalidRequestError(
                f"{', '.join(others)} cannot be given with --own-server: the engine's server has settings of its own.",
                "Leave out one or the other; `--engine-option` sets the engine's.",
            )
        _own_server(loading, plain=plain, host=host, port=port, print_only=print_only)
        return
    if print_only:
        raise InvalidRequestError("--print shows the command of an engine's own server.", "Add --own-server.")
    try:
        from polydraft_server import KEY_VARIABLE, server_settings
        from polydraft_server import serve as run_server
    except ModuleNotFoundError as error:
        raise PolydraftError(
            f"The server is not installed: there is no module {error.name}.",
            'Install it: `pip install "polydraft[server]"`. For an engine that has a server, add --own-server.',
        ) from error
    if no_auth and api_key_file is not None:
        raise InvalidRequestError("--no-auth and --api-key-file exclude one another.", "Leave one out.")
    key = None
    if not no_auth:
        key = Secret.from_environment(KEY_VARIABLE) if api_key_file is None else Secret.from_file(api_key_file)
    defaults = checked_settings(settings)
    target, arguments = load_arguments(loading, plain=plain)
    if plain:
        defaults["speculate"] = "off"
    told = server_settings(
        host=host,
        port=port,
        key=key,
        no_auth=no_auth,
        names=tuple(served_model_name or ()),
        origins=tuple(cors_origin or ()),
        defaults=defaults,
        max_running=max_running,
        max_waiting=max_waiting,
        request_seconds=request_seconds,
        stop_seconds=stop_seconds,
        max_body_bytes=max_body_bytes,
    )
    load = partial(open_session, target, arguments)
    code = run_server(load, told, lambda line: typer.echo(presentable(line), err=True))
    for number in (signal.SIGINT, signal.SIGTERM):  # the process ends: one more does not change how
        signal.signal(number, signal.SIG_IGN)
    raise typer.Exit(code)


def _own_server(loading: dict[str, Any], *, plain: bool, host: str, port: int, print_only: bool) -> None:
    from polydraft._load import prepare
    from polydraft.engine_parts.serving import check_port

    target, arguments = load_arguments(loading, plain=plain)
    if arguments["prefix_cache_bytes"]:
        raise InvalidRequestError(
            "The engine's server sizes its prefix cache by itself.", "Leave out `prefix_cache_bytes`, or give 0."
        )
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
