"""``polydraft doctor``: what can run here, and how to fix what cannot."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from polydraft._cli import options as opt
from polydraft._cli.problems import FAILURE
from polydraft._cli.streams import claim_output, console_for
from polydraft._cli.waiting import waiting_for

if TYPE_CHECKING:
    from polydraft._cli.render.doctor import Findings, Machine

__all__ = ["doctor"]


def doctor(json: opt.Json = False) -> None:
    """Show for every backend whether it can run here, and if not, the command that fixes it.

    Backends that are known but not installed are listed too, and the known faults of installed engine versions.
    The exit code is 0 if at least one backend is usable, else 1.
    """
    from polydraft._cli.render.doctor import doctor_json, doctor_report

    output = claim_output()
    with waiting_for("Asking the engines"):
        findings = _examine()
    if json:
        print(doctor_json(findings), file=output, flush=True)
    else:
        console_for(output).print(doctor_report(findings))
    if not findings.usable:
        raise typer.Exit(FAILURE)


def _examine() -> Findings:
    """Look at this machine and at all backends. Loads no weights and needs no network."""
    from polydraft._cli.render.doctor import Findings
    from polydraft._environments.store import Broken, all_environments
    from polydraft._registry.describe import (
        describe_backends,
        missing_backends,
        plugins_without_backend,
        surviving_host,
    )

    host = surviving_host()
    installed, broken = describe_backends(host), plugins_without_backend(host)
    missing = missing_backends(installed, broken)
    environments = [found for found in all_environments().values() if isinstance(found, Broken)]
    return Findings(_look_at_machine(), installed, missing, broken, environments, host.notes())


def _look_at_machine() -> Machine:
    from importlib.metadata import version

    from polydraft._cli.render.doctor import Machine
    from polydraft.contract.records import CONTRACT_VERSION

    total, free = _memory()
    return Machine(
        polydraft=version("polydraft"),
        contract_version=CONTRACT_VERSION,
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=total,
        free_memory_bytes=free,
    )


def _memory() -> tuple[int | None, int | None]:
    """Total bytes, and those that are free within the limits of containers.

    None where the system does not report them (macOS reports no available ones).
    """
    from polydraft.hardware import free_memory

    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        total = None
    free = free_memory() if Path("/proc/meminfo").exists() else None
    return total, free
