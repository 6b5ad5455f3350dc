"""``polydraft engines``: engines in environments of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from polydraft._cli import options as opt
from polydraft._cli.streams import claim_output, console_for
from polydraft.errors import EnvironmentSetupError, InvalidRequestError, PolydraftError

if TYPE_CHECKING:
    from polydraft._environments.progress import Progress
    from polydraft._environments.records import Environment

__all__ = ["COMMANDS"]

_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="An engine that `polydraft engines list` shows.", autocompletion=opt.engine_names
    ),
]
_Again = Annotated[bool, typer.Option("--again", help="Make the environment anew even if it is up to date.")]
_ACCELERATORS = ("auto", "cpu", "cuda", "metal")


def list_(json: opt.Json = False) -> None:
    """List every engine: whether it is installed, what it needs on this machine, and if it cannot be installed, why."""
    from polydraft._cli.render.engines import engines_json, engines_table
    from polydraft._environments.listing import engines

    output = claim_output()
    found = engines()
    if json:
        print(engines_json(found), file=output, flush=True)
    else:
        console_for(output).print(engines_table(found))


def install(
    name: _Name,
    accelerator: Annotated[
        str, typer.Option("--accelerator", help="auto: the fastest of this machine; or cpu, cuda, metal.")
    ] = "auto",
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Where polydraft's own packages come from: a clone, a folder of wheels, or index. Default: where this "
            "polydraft came from.",
        ),
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="A path, or a version such as 3.12. Default: this one, if it fits.")
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option("--package", help="What brings another author's plugin NAME, as pip takes it. May be repeated."),
    ] = None,
    again: _Again = False,
    json: opt.Json = False,
) -> None:
    """Install an engine into an environment of its own, in the versions that were tested.

    It is made with uv where that is installed, else with venv and pip, in the folder POLYDRAFT_DATA_DIR, or else in
    polydraft's data folder, and tested: a small model decodes with speculation and plainly. An installation that fails
    or is interrupted leaves what was installed before; started again, it takes what is downloaded from the cache of pip
    or uv.
    """
    from polydraft._environments.install import install as make

    if accelerator not in _ACCELERATORS:
        raise InvalidRequestError(
            f"--accelerator {accelerator} is unknown.", f"Give {', '.join(_ACCELERATORS[:-1])} or {_ACCELERATORS[-1]}."
        )
    output = claim_output()
    with _progress() as progress:
        environment, made = make(
            name,
            progress,
            accelerator=accelerator,
            source=source,
            python=python,
            packages=tuple(package or ()),
            again=again,
        )
    _tell(output, [(environment, made)], json)


def update(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One engine only; default: all that are installed.")
    ] = None,
    again: _Again = False,
    json: opt.Json = False,
) -> None:
    """Make environments anew that are not up to date. Programs that run the old one keep it until they end."""
    from polydraft._environments.install import update as make
    from polydraft._environments.plan import engine_name
    from polydraft._environments.store import all_environments

    output = claim_output()
    done: list[tuple[Environment, bool]] = []
    failed: PolydraftError | None = None
    with _progress() as progress:
        for one in [*all_environments()] if name is None else [engine_name(name)]:
            try:
                done.append(make(one, progress, again=again))
            except PolydraftError as error:  # which concerns no other
                if failed is not None:
                    progress.note(f"{failed}")
                failed = error
    if done or failed is None:
        _tell(output, done, json)
    if failed is not None:
        raise failed


def remove(name: _Name, json: opt.Json = False) -> None:
    """Remove an engine's environment, and what was compiled for it."""
    from polydraft._cli.render.tables import to_json
    from polydraft._environments.install import remove_engine
    from polydraft._environments.plan import engine_name

    output = claim_output()
    known = engine_name(name)
    with _progress() as progress:
        removed = remove_engine(known, progress)
    told = f"{known} is removed." if removed else f"{known} is not installed."
    print(to_json({"name": known, "removed": removed}) if json else told, file=output, flush=True)


def path(name: _Name, json: opt.Json = False) -> None:
    """Print the folder of an engine's environment."""
    from polydraft._cli.render.tables import to_json
    from polydraft._environments.plan import engine_name
    from polydraft._environments.store import Broken, all_environments

    output = claim_output()
    known = engine_name(name)
    found = all_environments().get(known)
    if found is None:
        raise EnvironmentSetupError(
            f"{known} has no environment of its own.", f"Install it: `polydraft engines install {known}`"
        )
    if isinstance(found, Broken):
        raise EnvironmentSetupError(f"The environment of {known} cannot be used. {found.reason}", found.hint)
    told = to_json({"name": known, "folder": str(found.folder), "python": str(found.python)})
    print(told if json else found.folder, file=output, flush=True)


def _progress() -> AbstractContextManager[Progress]:
    from polydraft._environments.progress import showing_progress

    return showing_progress()


def _tell(output: TextIO, done: Sequence[tuple[Environment, bool]], json: bool) -> None:
    from polydraft._cli.render.engines import environment_data, environment_lines
    from polydraft._cli.render.tables import to_json

    if json:
        print(to_json({"engines": [environment_data(*one) for one in done]}), file=output, flush=True)
    else:
        lines = [environment_lines(*one) for one in done] or ["No engine is installed in an environment of its own."]
        console_for(output).print("\n".join(lines))


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_,
    "install": install,
    "update": update,
    "remove": remove,
    "path": path,
}
