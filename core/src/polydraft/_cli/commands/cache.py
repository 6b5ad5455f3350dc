"""``polydraft cache``: what polydraft keeps on this machine, how large it is, and how to remove it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polydraft._cli import options as opt
from polydraft._cli.streams import claim_output, console_for
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from polydraft.contract import CacheRecord

__all__ = ["cache"]


def cache(
    action: Annotated[
        str | None,
        typer.Argument(metavar="[clear]", help="Remove what is kept, except verifications and measurements."),
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Clear this cache only.")] = None,
    json: opt.Json = False,
) -> None:
    """List what polydraft keeps on this machine between runs, or remove it.

    What a process uses at the moment is not removed. Verifications and measurements are removed only if they are named,
    as in `polydraft cache clear verified`: they are not made again by themselves. Models from the Hub are in the Hub's
    own cache: see `hf cache`.

    Each cache of files is held to POLYDRAFT_CACHE_LIMIT, a number of GiB, 50 by default: what was used longest ago is
    removed first.
    """
    from polydraft._cli.render.cache import cache_json, cache_table, cleared_json, cleared_lines
    from polydraft.caches import entries_of, remove, remove_left_overs

    output = claim_output()
    records = _records()
    for record in records:
        remove_left_overs(Path(record.path))
    if action is None:
        found = [(record, entries_of(Path(record.path))) for record in records]
        if json:
            print(cache_json(found), file=output, flush=True)
        else:
            console_for(output).print(cache_table(found))
        return
    if action != "clear":
        raise InvalidRequestError(f"`polydraft cache` has no action {action!r}.", "Use `polydraft cache clear`.")
    chosen = [record for record in records if record.name == name or (name is None and record.rebuilt)]
    if not chosen:
        raise InvalidRequestError(
            f"There is no cache {name!r}.", f"There are: {', '.join(record.name for record in records)}."
        )
    cleared = []
    for record in chosen:
        entries = entries_of(Path(record.path))
        cleared.append((record, entries, [entry for entry in entries if not remove(entry)]))
    if json:
        print(cleared_json(cleared), file=output, flush=True)
    else:
        console_for(output).print(cleared_lines(cleared))


def _records() -> list[CacheRecord]:
    """polydraft's own, then those of plugins."""
    from polydraft._plugins import default_host
    from polydraft._probes.kept import diagnosis_folder
    from polydraft._tune._store import folder as tuned
    from polydraft.checkpoints.contents import digest_folder
    from polydraft.contract import CacheRecord
    from polydraft.verification._store import folder

    own = [
        CacheRecord(
            name="verified",
            summary="what `polydraft verify` found",
            path=str(folder()),
            bounded=False,
            rebuilt=False,
        ),
        CacheRecord(
            name="digests", summary="digests of large files, at most 4096", path=str(digest_folder()), bounded=False
        ),
        CacheRecord(
            name="diagnoses",
            summary="what backends said about this machine, at most 256",
            path=str(diagnosis_folder()),
            bounded=False,
        ),
        CacheRecord(
            name="tuned",
            summary="what `polydraft tune` measured",
            path=str(tuned()),
            bounded=False,
            rebuilt=False,
        ),
    ]
    names = {record.name for record in own}
    return [*own, *(record for record in default_host().caches() if record.name not in names)]
