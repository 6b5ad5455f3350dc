"""``polydraft backends``: what is installed, and what is broken or disabled."""

from __future__ import annotations

from polydraft._cli import options as opt
from polydraft._cli.streams import claim_output, console_for

__all__ = ["backends"]


def backends(json: opt.Json = False) -> None:
    """List the installed backends, and plugins that are broken or disabled, each with the reason."""
    from polydraft._cli.render.backends import backends_json, backends_table
    from polydraft._registry.describe import describe_backends, plugins_without_backend, surviving_host

    output = claim_output()
    host = surviving_host()
    found, others = describe_backends(host), plugins_without_backend(host)
    if json:
        print(backends_json(found, others), file=output, flush=True)
    else:
        console_for(output).print(backends_table(found, others))
