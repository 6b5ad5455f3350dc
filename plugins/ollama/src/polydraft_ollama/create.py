"""Putting a pair that lies in files on the server, as ``ollama create`` does with a Modelfile."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.errors import EngineError, InvalidRequestError
from polydraft.files import system_errors

from polydraft_ollama.model import served_model

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest

    from polydraft_ollama.client import OllamaClient
    from polydraft_ollama.options import OllamaOptions

__all__ = ["create"]

_STATUSES = 100_000
"""Lines of progress that are read at most."""


def create(client: OllamaClient, request: LoadRequest, options: OllamaOptions, name: str) -> str:
    """Create the model ``name`` of target and drafter. Returns its Modelfile, in one line, for the user.

    Raises:
        PolydraftError: A file is missing or damaged, the pair does not fit, or the server refuses it.
    """
    target, drafter = _files(request)
    k = request.plan.num_speculative_tokens if drafter is not None else 0
    source = request.target.id if target is None else str(target)
    lines = [f"FROM {source}"]
    if drafter is not None:
        lines += [f"DRAFT {drafter}", f"PARAMETER draft_num_predict {k}"]
    if options.modelfile is not None:
        with system_errors(f"The Modelfile {options.modelfile} cannot be written"):
            options.modelfile.write_text("\n".join(lines) + "\n", encoding="utf-8")
    body: dict[str, Any] = {"model": name}
    if target is None:
        body["from"] = request.target.id
    else:
        body["files"] = {target.name: _sent(client, options, target)}
    if drafter is not None:
        body |= {
            "draft_files": {drafter.name: _sent(client, options, drafter)},
            "parameters": {"draft_num_predict": k},
        }
    _run(client, body)
    told = f"Created {name}: {'; '.join(lines)}."
    if drafter is not None and served_model(client, name).has_drafter is False:
        raise EngineError(
            f"{client.name} has created {name} without its drafter.", "Update Ollama (https://ollama.com/download)."
        )
    return told


def _files(request: LoadRequest) -> tuple[Path | None, Path | None]:
    """The GGUF files of target and drafter here; None: the target is the server's, or there is no drafter."""
    from polydraft.checkpoints.gguf_files import fetch_gguf, parts_of
    from polydraft_gguf.files import fetch_pair

    if request.target.kind == "served":
        drafter = request.plan.drafter
        if drafter is None:
            raise InvalidRequestError(
                f"{request.target.id} is a model of the server, and no drafter is given to add to it.",
                "Give its GGUF file as `drafter`.",
            )
        if drafter.format != "gguf":
            raise InvalidRequestError(f"The drafter {drafter.id} is not a GGUF file.", "Give a GGUF file.")
        return None, Path(fetch_gguf(drafter, request.hub))
    # Where the server computes is not known.
    target, beside = fetch_pair(request, on_cpu=False)
    for file in filter(None, (target, beside)):
        if len(parts_of(file.path)) > 1:
            raise InvalidRequestError(
                f"{file.source.id} is split into parts, and Ollama takes one file.",
                "Merge it: `llama-gguf-split --merge`.",
            )
    return target.path, None if beside is None else beside.path


def _sent(client: OllamaClient, options: OllamaOptions, file: Path) -> str:
    """The digest of a file, once the server has it."""
    import httpx
    import ollama

    with file.open("rb") as source:
        digest = f"sha256:{hashlib.file_digest(source, 'sha256').hexdigest()}"
    headers = {"Authorization": f"Bearer {client.key.reveal()}"} if client.key else {}
    timeout = httpx.Timeout(options.read_timeout, connect=options.connect_timeout)
    try:
        # Asked first: a server that has a file hangs up on who sends it again.
        there = httpx.head(f"{client.url}/api/blobs/{digest}", headers=headers, timeout=timeout)
        if there.status_code != httpx.codes.OK:
            ollama.Client(host=client.url, headers=headers, timeout=timeout, follow_redirects=False).create_blob(file)
    except ollama.ResponseError as error:
        raise client.refused(error.status_code, {"error": error.error}) from None
    except (httpx.HTTPError, ConnectionError) as error:
        raise EngineError(
            f"{file.name} could not be sent to {client.name}: {client.shown(str(error) or type(error).__name__)}.",
            "Look at its log.",
        ) from None
    return digest


def _run(client: OllamaClient, body: dict[str, Any]) -> None:
    status = ""
    with closing(client.answer("/api/create", body, num_tokens=_STATUSES)) as lines:
        for line in lines:
            status = str(line.get("status") or status)
    if status != "success":
        raise EngineError(f"{client.name} did not finish: its last words are {client.shown(status)!r}.", "Try again.")
