"""What a server says of one of its models, as far as it concerns speculation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polydraft_ollama.client import OllamaClient

__all__ = ["ServedModel", "digest_of", "served_model"]

_DRAFT = re.compile(r"^\s*DRAFT\s+\S", re.MULTILINE | re.IGNORECASE)
_QUOTED = re.compile(r'"""[\s\S]*?"""')
"""Templates and licenses, whose lines are no instructions."""
_PARAMETER = r"^\s*(?:PARAMETER\s+)?{}\s+(-?\d+)"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as its server describes it."""

    name: str
    has_drafter: bool | None
    """None: the server does not say."""
    num_speculative_tokens: int | None
    """The ``draft_num_predict`` of its Modelfile, if it has one; 0: no drafts."""
    context_length: int | None
    """The model's own."""
    given_context_length: int | None
    """The ``num_ctx`` of its Modelfile, if it has one; None: the server chooses."""
    quantization: str
    """Empty: not known."""


def served_model(client: OllamaClient, name: str) -> ServedModel:
    """Ask for a model.

    Raises:
        ModelNotFoundError: The server has none of that name.
        EngineError: It failed, or its answer is none.
    """
    found = client.show(name)
    modelfile, parameters = (_QUOTED.sub("", _text(found.get(field))) for field in ("modelfile", "parameters"))
    info, details = (_object(found.get(field)) for field in ("model_info", "details"))
    k, length = (_parameter(name, parameters, modelfile) for name in ("draft_num_predict", "num_ctx"))
    inside = any(key.endswith(".nextn_predict_layers") and _number(value) for key, value in info.items())
    # A drafter inside the target's file is off unless the parameter says otherwise.
    drafts = bool(_DRAFT.search(modelfile)) or inside or bool(k)
    lengths = [_number(value) for key, value in info.items() if key.endswith(".context_length")]
    return ServedModel(
        name=name,
        has_drafter=True if drafts else (False if modelfile.strip() else None),
        num_speculative_tokens=None if k is None else max(k, 0),
        context_length=next(filter(None, lengths), None) or _number(details.get("context_length")),
        given_context_length=_number(length),
        quantization=_text(details.get("quantization_level")),
    )


def digest_of(client: OllamaClient, name: str) -> str:
    """The digest of a model's files, with and without ``:latest`` in its name, in any letter case; empty: not told."""
    name = name.lower()
    names = {name, f"{name}:latest"} if ":" not in name.rpartition("/")[2] else {name}
    return next((_text(model.get("digest")) for model in client.models() if model["name"].lower() in names), "")


def _parameter(name: str, *texts: str) -> int | None:
    pattern = re.compile(_PARAMETER.format(name), re.MULTILINE | re.IGNORECASE)
    return next((int(found[1]) for text in texts if (found := pattern.search(text))), None)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**31 else None
