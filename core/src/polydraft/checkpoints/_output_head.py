"""Whether a model's output head is its embedding (tied) or a tensor of its own: the checkpoint's tensors decide.

``tie_word_embeddings`` of a config may say otherwise, after training or converting by other tools, and engines disagree
on which of the two to believe.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints._weight_files import weights_of
from polydraft.checkpoints.config import family, read_config, text_config
from polydraft.checkpoints.safetensors import header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["corrected_config", "head_note"]

_FIELD = "tie_word_embeddings"
_HEAD, _EMBEDDING = re.compile(r"(^|\.)lm_head\."), re.compile(r"(^|\.)embed_tokens\.")


def corrected_config(folder: Path) -> str:
    """The text of a ``config.json`` that agrees with the weights; empty if that in ``folder`` does.

    Raises:
        ModelFormatError: As ``weight_files`` and ``read_config``.
    """
    config, tied = _contradiction(folder)
    if tied is None:
        return ""
    config[_FIELD] = tied
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], _FIELD: tied}
    return json.dumps(config, indent=1)


def head_note(folder: Path, name: str) -> str:
    """A note for the user of the model ``name`` where its config and its weights disagree; else empty."""
    _, tied = _contradiction(folder)
    if tied is None:
        return ""
    if tied:
        return f"The weights of {name} hold no output head, as its config says they do: its embedding is used."
    return (
        f"The weights of {name} hold an output head of their own, though its config says that it has none: it is used."
    )


def _contradiction(folder: Path) -> tuple[dict[str, Any], bool | None]:
    """The config, and whether the head is tied by the tensors; None where the config says the same."""
    file = folder / "config.json"
    if not file.is_file():
        return {}, None
    config = read_config(file, str(folder))
    names = list(_tensors(folder))
    if not any(map(_EMBEDDING.search, names)):  # nothing that a head could be tied to, or none of these layouts
        return config, None
    tied = not any(map(_HEAD.search, names))
    # Where a config leaves the field out, the architecture's default counts, which is to tie in Gemma's.
    said = [part[_FIELD] for part in (config, text_config(config)) if isinstance(part.get(_FIELD), bool)]
    said = said or [family(config).startswith("gemma")]
    return config, None if all(one is tied for one in said) else tied


def _tensors(folder: Path) -> Iterable[str]:
    weights = weights_of(folder)
    named: Mapping[str, Any] | None = weights.weight_map
    return named if named is not None else (name for file in weights.files for name in header(file))
