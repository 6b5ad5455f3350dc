"""From a load request to a model of a running server."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from polydraft import reasons
from polydraft.contract import RunningInfo
from polydraft.engine_parts.server_options import THE_SERVERS
from polydraft.errors import ContextLengthError, InvalidRequestError, SpeculationUnavailableError, UnsupportedError

from polydraft_ollama.client import OllamaClient, can_draft
from polydraft_ollama.engine import OllamaEngine
from polydraft_ollama.model import ServedModel, served_model
from polydraft_ollama.options import OllamaOptions
from polydraft_ollama.plugin import FIRST_VERSION

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest, OffReason

__all__ = ["load_pair"]

_USUAL_LENGTH = 4096
"""Of the context, where the server does not tell it."""


def load_pair(request: LoadRequest) -> OllamaEngine:
    """Find the model on the server, or put it there first (``create_as``). The first request loads it into memory.

    Raises:
        BackendUnavailableError: There is no Ollama, or it refuses the key.
        ModelNotFoundError: It has no model of that name.
        InvalidRequestError: The target is no name of the server's, and none is given to create it under.
        SpeculationUnavailableError: The server is too old to draft.
        UnsupportedError: A dtype was given.
        ContextLengthError: The context is longer than the model's.
        EngineError: The server failed.
    """
    options: OllamaOptions = request.engine_options or OllamaOptions()
    name = options.create_as or request.target.id
    client = OllamaClient(options, name)
    _check(request, options)
    version = client.version()
    off = _too_old(request, options, version, name)
    notes: list[str] = []
    if options.create_as:
        from polydraft_ollama.create import create

        notes.append(create(client, request, options, options.create_as))
    model = served_model(client, name)
    if request.context_length and model.context_length and request.context_length > model.context_length:
        raise ContextLengthError(
            f"`context_length={request.context_length}` is too long: the context of {name} is {model.context_length} "
            "tokens.",
            f"Give `context_length={model.context_length}` or less.",
            argument="context_length",
        )
    k, off, note = _speculation(request, model, off)
    notes.append(note)
    longest = model.context_length or _USUAL_LENGTH
    if not (request.context_length or model.given_context_length):
        most = f", at most {model.context_length} tokens" if model.context_length else ""
        notes.append(f"Ollama chooses the length of the context{most}; `context_length` sets it.")
    if request.prefix_cache_bytes == 0:
        notes.append("`prefix_cache_bytes=0` has no effect: Ollama keeps the KV of earlier calls by itself.")
    fixed = options.of_the_server()
    if request.device == "cpu":
        fixed["num_gpu"] = 0
    if request.context_length:
        fixed["num_ctx"] = request.context_length
    body: dict[str, Any] = {"model": name}
    if options.keep_alive is not None:
        body["keep_alive"] = options.keep_alive
    running = RunningInfo.of(
        request,
        engine="ollama",
        engine_version=version,
        dtype=model.quantization or THE_SERVERS,
        device=f"{THE_SERVERS} cpu" if request.device == "cpu" else THE_SERVERS,
        context_length=request.context_length or min(model.given_context_length or longest, longest),
        concurrency="concurrent",
        notes=[f"Server: {client.url}", *notes],
    )
    told = {"target": name, "num_speculative_tokens": k, "speculation_off": off, "packing": None}
    if not k:
        told |= {"method": None, "max_speculative_tokens": None, "drafter": None}
    running = running.model_copy(update=told)
    return OllamaEngine(client, body, fixed, running)


def _check(request: LoadRequest, options: OllamaOptions) -> None:
    """Refuse what the server cannot do with this target, before it is asked."""
    if request.device == "cpu" and (options.num_gpu or options.main_gpu is not None):
        raise InvalidRequestError(
            f"{'num_gpu' if options.num_gpu else 'main_gpu'} is given, and `device='cpu'`.", "Leave one of them out."
        )
    if request.dtype != "auto" and request.target.kind == "served":
        raise UnsupportedError(
            "Ollama runs weights as they are stored: `dtype` was given.", "Leave it out, or load another model."
        )
    if options.create_as is None:
        written = request.target.id
        drafter = request.plan.drafter
        if request.target.kind != "served" or drafter is not None:
            named = drafter is not None and request.plan.chosen_by == "caller"
            further = f" --drafter {shlex.quote(drafter.id)}" if drafter is not None and named else ""
            raise InvalidRequestError(
                f"Ollama loads models, with their drafters, by its own names, and "
                f"{written if drafter is None or request.target.kind != 'served' else drafter.id} is none of those.",
                f"Make one of it: `polydraft ollama create NAME {shlex.quote(written)}{further}`, then load NAME.",
            )
    elif options.modelfile is not None and options.modelfile.is_dir():
        raise InvalidRequestError(f"The Modelfile {options.modelfile} is a folder.", "Give a file.")


def _too_old(request: LoadRequest, options: OllamaOptions, version: str, name: str) -> OffReason | None:
    """Why a server of this version drafts nothing; None if it may.

    Raises:
        SpeculationUnavailableError: The caller asked for drafts.
    """
    if request.plan.kind is None or can_draft(version):
        return None
    found = f"Ollama {version} has no speculative decoding"
    if request.chosen_by.num_speculative_tokens == "caller" or options.create_as:
        raise SpeculationUnavailableError(
            f"{found} of GGUF models: it does not know `DRAFT` and draft_num_predict.",
            f"Update it to {FIRST_VERSION} or later (https://ollama.com/download), or give `drafter=None`.",
        )
    return reasons.by_engine(f"{found}; {name} would need {FIRST_VERSION} or later.")


def _speculation(request: LoadRequest, model: ServedModel, off: OffReason | None) -> tuple[int, OffReason | None, str]:
    """k (0: plain decoding), why it is plain, and a note."""
    plan = request.plan
    if plan.kind is None or off is not None:
        return 0, plan.off or off, ""
    asked = request.chosen_by.num_speculative_tokens == "caller"
    own = model.num_speculative_tokens
    if own == 0 and not asked:
        off = reasons.by_engine(
            f"The Modelfile of {model.name} sets draft_num_predict to 0; `num_speculative_tokens` asks for drafts."
        )
        return 0, off, ""
    if model.has_drafter is False and not asked:
        return 0, reasons.by_engine(_without_drafter(model.name)), ""
    said = "shows no drafter of" if model.has_drafter is False else "does not say whether there is a drafter of"
    note = "" if model.has_drafter else f"Ollama {said} {model.name}: without one it decodes plainly."
    chosen = asked or request.chosen_by.num_speculative_tokens == "measured"
    return plan.num_speculative_tokens if chosen or own is None else own, None, note


def _without_drafter(name: str) -> str:
    return (
        f"{name} has no drafter on the server; `polydraft ollama create NAME MODEL` makes a model with one, from files."
    )
