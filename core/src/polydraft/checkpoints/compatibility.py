"""Check by their configs that a target and a drafter belong together, before any weights are loaded.

A drafter of another target never makes the output wrong, but it wastes time, and some engines crash on it. An assistant
of equal width for another target loads without an error, and its drafts are hardly ever accepted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints._hub import hub_errors
from polydraft.checkpoints._names import repository
from polydraft.checkpoints._tokens import TOKENIZER_FILE, check_tokens
from polydraft.checkpoints.config import family, is_assistant, kv_shapes, layer_types, text_config
from polydraft.errors import PairMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polydraft.contract.records import DrafterKind
    from polydraft.contract.requests import HubOptions, ModelSource

__all__ = ["check_pair", "check_target"]

_FIND = "`polydraft pairs` lists the drafter of each known target."


def check_target(target: ModelSource) -> None:
    """Check that the model can be a target at all.

    Raises:
        PairMismatchError: It is an assistant, which cannot generate without its target.
    """
    if is_assistant(target.config):
        raise PairMismatchError(
            f"{target.id} is a drafter ({target.model_type}), not a target.",
            "Load the target that it belongs to, and give this one as `drafter`.",
        )


def check_pair(target: ModelSource, drafter: ModelSource, kind: DrafterKind, *, hub: HubOptions | None = None) -> None:
    """Check that a drafter fits its target.

    For ``mtp``: the architectures belong together, ``backbone_hidden_size`` is the target's ``hidden_size``, both have
    the same vocabulary size and sliding window, and for each attention type of the assistant the target has keys and
    values of the same shape. For ``mtp`` and ``draft-model``: both have the same tokens, where both ``tokenizer.json``
    or GGUF files are on this machine; for ``draft-model`` a ``tokenizer.json`` is fetched from the Hub if need be, as
    nothing else shows it. A target may have further tokens; then its vocabulary may be larger. What a config lacks, as
    for some GGUF files, is left to the engine's plugin.

    Args:
        target: The resolved target.
        drafter: The resolved drafter.
        kind: How the drafter will be used.
        hub: How to reach the Hub for tokenizers; None: only local ones are compared.

    Raises:
        PairMismatchError: They do not fit; the sentence says what differs.
        ModelFormatError: A tokenizer file cannot be read.
        ModelNotFoundError: A tokenizer cannot be fetched.
    """
    if is_assistant(target.config) and not is_assistant(drafter.config) and drafter.config:
        raise PairMismatchError(
            f"Target and drafter are swapped: {target.id} is the drafter ({target.model_type}).",
            f"Load {drafter.id} with `drafter={target.id!r}`.",
        )
    check_target(target)
    if kind == "mtp":
        _check_roles(target, drafter)
    elif kind == "draft-model" and is_assistant(drafter.config):
        raise PairMismatchError(
            f"{drafter.id} is an assistant ({drafter.model_type}); it cannot draft as a model of its own.",
            "Use it with the target that it belongs to: its kind is mtp.",
        )
    if kind in {"mtp", "draft-model"}:
        fetch_with = hub if kind == "draft-model" else None
        ours, theirs = _tokenizer_file(target, fetch_with), _tokenizer_file(drafter, fetch_with)
        # A GGUF file cannot be compared with a tokenizer.json.
        comparable = bool(ours and theirs and (ours.name == TOKENIZER_FILE) == (theirs.name == TOKENIZER_FILE))
        differences = _differences(target, drafter, tokens_known=comparable) if kind == "mtp" else ()
        if differences:
            raise PairMismatchError(f"{drafter.id} is not a drafter for {target.id}: {'; '.join(differences)}.", _FIND)
        if comparable and ours and theirs:
            check_tokens(ours, theirs, names=(target.id, drafter.id))


def _tokenizer_file(source: ModelSource, hub: HubOptions | None) -> Path | None:
    """The model's ``tokenizer.json``, or the GGUF file that it is; None if its tokens cannot be read here."""
    if source.kind != "hub":
        if source.path is None or source.format == "litertlm":
            return None
        file = source.path / TOKENIZER_FILE if source.path.is_dir() else source.path
        return file if file.is_file() else None
    if hub is None or source.format not in {"safetensors", "mlx"}:
        return None
    repo, hub = repository(source.id), hub.model_copy(update={"revision": source.revision})
    with hub_errors(repo, hub) as reached:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(repo, TOKENIZER_FILE, **reached.arguments()))
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            return None


def _check_roles(target: ModelSource, drafter: ModelSource) -> None:
    """Two targets, or an assistant of another architecture."""
    if not drafter.config or not target.config:
        return
    if not is_assistant(drafter.config):
        raise PairMismatchError(
            f"{drafter.id} is a target ({drafter.model_type or 'of unknown type'}), not an assistant of kind mtp.",
            f"Give the assistant that was made for {target.id}. {_FIND}",
        )
    if family(drafter.config) != family(target.config):
        raise PairMismatchError(
            f"{drafter.id} is a drafter for {family(drafter.config)} targets, but {target.id} is {target.model_type}.",
            f"Give the assistant that was made for {target.id}. {_FIND}",
        )


def _differences(target: ModelSource, drafter: ModelSource, *, tokens_known: bool) -> list[str]:
    """Every way in which an assistant's config does not fit the target's."""
    ours, theirs = text_config(target.config), text_config(drafter.config)
    found: list[str] = []
    # An assistant takes the target's hidden states as input, so their width must be the same.
    backbone, hidden = drafter.config.get("backbone_hidden_size"), ours.get("hidden_size")
    if backbone is not None and hidden is not None and backbone != hidden:
        found.append(f"it was made for a target of hidden size {backbone}, this one has {hidden}")
    # Where the tokens themselves are compared, a target may have more of them, added after its assistant was made.
    if not tokens_known or (ours.get("vocab_size") or 0) < (theirs.get("vocab_size") or 0):
        found += _unequal("vocab_size", "vocabulary size", ours, theirs)
    wanted, given = kv_shapes(drafter.config), kv_shapes(target.config)
    if wanted and given:
        for kind, shape in wanted.items():
            if kind not in given:
                found.append(f"it attends to {_words(kind)} layers, of which the target has none")
            elif given[kind] != shape:
                found.append(f"in {_words(kind)} layers it reads {shape}, the target has {given[kind]}")
    # Without such a layer the drafter never looks through the window.
    if "sliding_attention" in layer_types(drafter.config):
        found += _unequal("sliding_window", "sliding window", ours, theirs)
    return found


def _unequal(field: str, words: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    a, b = ours.get(field), theirs.get(field)
    if a is None or b is None or a == b:
        return []
    return [f"its {words} is {b}, the target's {a}"]


def _words(kind: str) -> str:
    return kind.removesuffix("_attention").replace("_", " ") + "-attention"
