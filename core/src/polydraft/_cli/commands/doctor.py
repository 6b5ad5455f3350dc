"""``polydraft doctor``: what can run here, and how to mend what cannot."""

from __future__ import annotations

import typer

from polydraft._cli import options as opt
from polydraft._cli.problems import FAILURE
from polydraft._cli.streams import claim_output, console_for

__all__ = ["doctor"]


def doctor(json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Say of every backend whether it can run here, and if not, the command that mends it.

    Backends that are known but not installed are listed too, and the known faults of installed engine versions.
    The exit code is 0 if at least one backend is usable, else 1.
    """
    from polydraft._cli.examination import examine
    from polydraft._cli.render.doctor import doctor_json, doctor_report

    output = claim_output()
    findings = examine()
    if json:
        output.write(doctor_json(findings) + "\n")
        output.flush()
    else:
        console_for(output).print(doctor_report(findings))
    if not findings.usable:
        raise typer.Exit(FAILURE)
