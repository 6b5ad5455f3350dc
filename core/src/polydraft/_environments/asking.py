"""``load(..., install=...)``: an engine that is not installed is installed if the user wants that, never otherwise."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from polydraft.errors import BackendNotFoundError, BackendUnavailableError

if TYPE_CHECKING:
    from polydraft._environments.plan import InstallPlan

__all__ = ["installing"]

R = TypeVar("R")

_progress = logging.getLogger("polydraft.progress")


def installing(wanted: str, work: Callable[[], R]) -> R:
    """Do some work; if it fails because an engine is not installed, and the user wants that, install it and try again.

    Args:
        wanted: ``yes``: install it. ``ask``: ask, if there is a terminal to ask at. ``no``: do not.
        work: What to do.

    Raises:
        BackendNotFoundError: No backend of that name is installed; or what else ``work`` raises.
        EnvironmentSetupError: The engine cannot be installed.
    """
    tried: set[str] = set()
    while True:
        try:
            return work()
        except (BackendNotFoundError, BackendUnavailableError) as error:
            engine = error.engine
            if not engine or engine in tried or wanted == "no":
                raise
            tried.add(engine)
            _progress.info("Installing %s", engine, extra={"shows_itself": True})
            if wanted == "ask" and not _at_terminal():
                raise
            from polydraft._environments.plan import plan_for

            plan = plan_for(engine)
            if wanted == "ask" and not _yes(error.message, plan):
                raise
        from polydraft._environments.install import install
        from polydraft._environments.progress import showing_progress

        with showing_progress() as progress:
            install(engine, progress)


def _at_terminal() -> bool:
    return all(stream is not None and not stream.closed and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _yes(problem: str, plan: InstallPlan) -> bool:
    """Ask at the terminal; an end of input is a no."""
    variant = plan.variant
    print(
        f"{problem}\nInstall {plan.engine.name} for {variant.accelerator} into an environment of its own (about "
        f"{variant.disk_mb / 1000:.1f} GB, {variant.minutes} minute{'s' * (variant.minutes != 1)}, from "
        f"{plan.source})? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
