"""``polydraft backends``: what is installed, and what is broken or disabled."""

from __future__ import annotations

from polydraft._cli import options as opt
from polydraft._cli.streams import claim_output, console_for
from polydraft._cli.waiting import waiting_for

__all__ = ["backends"]


def backends(json: opt.Json = False) -> None:
    """List the backends: which run here, which have a server, and what is missing for the others.

    What an engine has said about this machine is kept until packages, drivers or hardware change; `polydraft doctor`
    asks anew.
    """
    from polydraft._cli.render.backends import backends_json, backends_table
    from polydraft._registry.describe import (
        describe_backends,
        missing_backends,
        plugins_without_backend,
        surviving_host,
    )

    output = claim_output()
    with waiting_for("Asking the engines"):
        host = surviving_host(kept=True)
        found, others = describe_backends(host, kept=True), plugins_without_backend(host)
        missing = missing_backends(found, others)
    if json:
        print(backends_json(found, others, missing), file=output, flush=True)
    else:
        console_for(output).print(backends_table(found, others, missing))
