"""``polydraft BACKEND create``: put a pair that lies in files on a backend's server, under a name of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from polydraft._cli.loading import load_arguments, open_session
from polydraft._cli.streams import claim_output
from polydraft._flags import FLAGS
from polydraft._presentable import presentable

__all__ = ["create_command"]


def create_command(backend: str) -> Callable[..., None] | None:
    """The command of an installed backend; None: there is none of that name, or it has no server to put models on."""
    from polydraft._plugins import default_host

    record = default_host().backends().get(backend)
    if record is None or not record.create_option:
        return None
    name_option = record.create_option

    def create(
        name: Annotated[str, typer.Argument(metavar="NAME", help="The name that the server is to give it.")],
        model: Annotated[
            str,
            typer.Argument(metavar="MODEL", help="Hub id, file, folder or builtin:<name>, or a model of the server."),
        ],
        drafter: Annotated[
            str, typer.Option(*FLAGS["drafter"], help="auto: the target's own; none; or a file, folder or Hub id.")
        ] = "auto",
        num_speculative_tokens: Annotated[
            int | None, typer.Option(*FLAGS["num_speculative_tokens"], metavar="K", help="What is drafted by default.")
        ] = None,
        quantization: Annotated[
            str, typer.Option(*FLAGS["quantization"], help="Of the target: see `polydraft pairs MODEL`.")
        ] = "auto",
        engine_options: Annotated[
            list[str] | None,
            typer.Option(*FLAGS["engine_options"], metavar="NAME=VALUE", help="An option of the backend's own."),
        ] = None,
        local_files_only: Annotated[
            bool, typer.Option(*FLAGS["local_files_only"], help="Use models of the local Hub cache only.")
        ] = False,
    ) -> None:
        """Put a pair that lies in files on the server, under a name, and load it once.

        The pair is found and checked as for generate. Afterwards the server runs it by that name.
        """
        from polydraft._cli.render.generation import describe_running

        output = claim_output()
        target, arguments = load_arguments(
            {
                "target": model,
                "drafter": drafter,
                "backend": backend,
                "num_speculative_tokens": None if num_speculative_tokens is None else str(num_speculative_tokens),
                "quantization": quantization,
                "engine_options": engine_options,
                "local_files_only": local_files_only,
            }
        )
        arguments["engine_options"] = {**(arguments["engine_options"] or {}), name_option: name}
        with open_session(target, arguments) as session:
            for line in describe_running(session.running):
                print(presentable(line), file=output, flush=True)

    return create
