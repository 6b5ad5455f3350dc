"""``polydraft batch``: a file of requests in OpenAI's batch format, answered into another file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from polydraft._cli import options as opt
from polydraft._cli.loading import checked_settings, load_arguments, open_session
from polydraft._cli.problems import FAILURE
from polydraft._cli.streams import claim_output
from polydraft._numbers import MOST_SECONDS
from polydraft._presentable import presentable
from polydraft.errors import InvalidRequestError, PolydraftError

__all__ = ["batch"]

_MUCH, _RAY = "How much at a time", "On several machines"


def batch(
    *,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests in OpenAI's batch format, one a line.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where answers go, one a line.")],
    loading: dict[str, Any],
    plain: Annotated[
        bool, typer.Option("--plain", help="Decode without speculation.", rich_help_panel="What runs")
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="What requests call the model. May be repeated. Default: the target's id.",
            rich_help_panel="What runs",
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
    request_seconds: Annotated[
        float,
        typer.Option(
            "--request-seconds",
            min=1,
            max=MOST_SECONDS,
            help="Time limit of a line's generation.",
            rich_help_panel=_MUCH,
        ),
    ] = 3600.0,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run on the workers of the Ray cluster at HOST:PORT; local: start one on this machine.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="With --ray: sessions. Default: 1.", rich_help_panel=_RAY),
    ] = None,
    worker_cpus: Annotated[
        float | None,
        typer.Option("--worker-cpus", min=0, help="With --ray: CPUs of each. Default: 1.", rich_help_panel=_RAY),
    ] = None,
    worker_gpus: Annotated[
        float | None,
        typer.Option("--worker-gpus", min=0, help="With --ray: GPUs of each. Default: 0.", rich_help_panel=_RAY),
    ] = None,
    settings: dict[str, Any],
    json: opt.Json = False,
) -> None:
    """Answer a file of requests, as the server would, into another file.

    Run the same command again after any interruption: answers in OUT are kept, and only what is left is done. The exit
    code is 1 if a line has an error; OUT says which, and why.
    """
    try:
        from polydraft_server import server_settings
        from polydraft_server.batch import RayWorkers, run_batch
        from polydraft_server.served import public_name
    except ModuleNotFoundError as error:
        raise PolydraftError(
            f"Batches need polydraft's server, which is not installed: there is no module {error.name}.",
            'Install it: `pip install "polydraft[server]"`.',
        ) from error
    asked = {"workers": workers, "cpus": worker_cpus, "gpus": worker_gpus}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if given and ray is None:
        raise InvalidRequestError("--workers, --worker-cpus and --worker-gpus need --ray.", "Add --ray ADDRESS.")
    if str(source) == "-" or str(output) == "-":
        raise InvalidRequestError(
            "A batch reads and writes files, not standard input and output: it is read twice, and can be resumed.",
            "Name two files.",
        )
    defaults = checked_settings(settings)
    target, arguments = load_arguments(loading, plain=plain)
    if plain:
        defaults["speculate"] = "off"
    if ray is not None and arguments["isolation"] == "auto":
        # A line that ends the engine is then found, and ends no worker.
        arguments["isolation"] = "process"
    out = claim_output()
    summary = run_batch(
        source,
        output,
        public_name(target),
        partial(open_session, target, arguments),
        server_settings(
            names=tuple(served_model_name or ()),
            defaults=defaults,
            max_running=max_running,
            request_seconds=request_seconds,
        ),
        ray=None if ray is None else RayWorkers(address=ray, **given),
        say=lambda line: typer.echo(presentable(line), err=True),
    )
    if json:
        print(summary.model_dump_json(), file=out, flush=True)
    else:
        print(
            f"{summary.completed} of {summary.total} lines answered, {summary.failed} with an error; "
            f"{summary.completion_tokens} tokens in {summary.seconds:.1f} s",
            file=out,
            flush=True,
        )
    if summary.failed:
        raise typer.Exit(FAILURE)
