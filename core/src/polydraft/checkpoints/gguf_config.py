"""A GGUF header translated to ``config.json``'s keys, so that one set of checks serves every format."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from polydraft.checkpoints.gguf import GgufHeader, read_header
from polydraft.errors import ModelFormatError

# Types of tokens (llama_token_type): ordinary text, and what is not part of it.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_ADDED = {_CONTROL, _USER_DEFINED}
__all__ = ["check_is_model", "config_of", "different_tokens", "kind_of", "read_gguf_config", "summary_of"]

_MOST_SUMMARIES = 256
_SUMMARIES: dict[tuple[int, ...], tuple[str, dict[str, Any]]] = {}
"""What was read from headers, by the state of their files."""
_KINDS = {
    "imatrix": "an importance matrix (imatrix)",
    "mmproj": "a projector for images or audio (mmproj)",
    "clip": "a projector for images or audio (mmproj)",
    "adapter": "an adapter (LoRA)",
    "controlvector": "a control vector",
}
"""``general.type`` or ``general.architecture`` -> what such a file is."""


def read_gguf_config(path: Path, name: str = "") -> dict[str, Any]:
    """The config of a GGUF file, from its header; messages call the model ``name``.

    Raises:
        ModelFormatError: It is not a GGUF file, its header is damaged, or it holds no model.
    """
    kind, config = summary_of(path, name)
    _check_kind(kind, name or str(path))
    return config


def summary_of(path: Path, name: str = "") -> tuple[str, dict[str, Any]]:
    """``kind_of`` and ``config_of`` a file, and its ``file_type`` in the config. Kept until the file changes.

    A header with a large vocabulary takes up to half a second to read.

    Raises:
        ModelFormatError: It is not a GGUF file, or its header is damaged.
    """
    try:
        status = path.stat()
    except OSError:
        return _summary(read_header(path, name))  # which says what is wrong
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if state not in _SUMMARIES:
        found = _summary(read_header(path, name))
        if len(_SUMMARIES) >= _MOST_SUMMARIES:
            _SUMMARIES.clear()
        _SUMMARIES[state] = found
    return deepcopy(_SUMMARIES[state])


def _summary(header: GgufHeader) -> tuple[str, dict[str, Any]]:
    number = header.metadata.get("general.file_type")
    return kind_of(header), config_of(header) | ({"file_type": number} if isinstance(number, int) else {})


def kind_of(header: GgufHeader) -> str:
    """What a file is, in words, if it is not a language model: a projector, an adapter; empty if it is one."""
    given = str(header.metadata.get("general.type", ""))
    return _KINDS.get(given) or _KINDS.get(header.architecture, "")


def check_is_model(header: GgufHeader, name: str) -> None:
    """Refuse a file that belongs to a model and is none.

    Raises:
        ModelFormatError: It is a projector, an importance matrix, an adapter or a control vector.
    """
    _check_kind(kind_of(header), name)


def _check_kind(kind: str, name: str) -> None:
    if kind:
        raise ModelFormatError(f"{name} is {kind}, not a language model.", "Give the GGUF file of the model itself.")


def config_of(header: GgufHeader) -> dict[str, Any]:
    """The fields that target and drafter are compared by; those that the header lacks are left out.

    The keys are those of llama.cpp (``src/llama-arch.cpp``), the names those of Transformers: ``embedding_length`` is
    ``hidden_size``, ``embedding_length_out`` of an assistant its ``backbone_hidden_size``, and so on. Head sizes of
    sliding-window layers have separate keys; heads may be one number or one per layer.
    """
    get = header.of_architecture
    config: dict[str, Any] = {
        "model_type": header.architecture.replace("-", "_"),
        "hidden_size": get("embedding_length"),
        "backbone_hidden_size": get("embedding_length_out"),
        "num_hidden_layers": get("block_count"),
        "max_position_embeddings": get("context_length"),
        "sliding_window": get("attention.sliding_window"),
        "num_kv_shared_layers": get("attention.shared_kv_layers"),
        "vocab_size": _vocab_size(header),
        "num_experts": get("expert_count"),
        **_attention(header),
    }
    return {name: value for name, value in config.items() if value is not None}


def different_tokens(target: GgufHeader, drafter: GgufHeader, names: tuple[str, str]) -> str:
    """The first difference of two files' tokens, as part of a sentence; empty if they give texts the same ids.

    One may have further ids at the end, or ids that the other does not use (padding), if they are not part of ordinary
    text: control, user-defined and unused tokens.
    """
    ours, theirs = target.metadata, drafter.metadata
    for key in ("model", "merges"):
        if ours.get(f"tokenizer.ggml.{key}") != theirs.get(f"tokenizer.ggml.{key}"):
            return "their tokenizers differ" if key == "model" else "their merge rules differ"
    tokens: list[Any] = [metadata.get("tokenizer.ggml.tokens") for metadata in (ours, theirs)]
    scores = [tuple(metadata.get("tokenizer.ggml.scores") or ()) for metadata in (ours, theirs)]
    common = min(map(len, scores))
    if scores[0][:common] != scores[1][:common]:
        return "the scores of their tokens differ"
    if tokens[0] == tokens[1] or None in tokens:
        return ""
    kinds = [metadata.get("tokenizer.ggml.token_type") or () for metadata in (ours, theirs)]

    def kind(side: int, index: int) -> int:
        return int(kinds[side][index]) if index < len(kinds[side]) else _NORMAL

    items = [one.items() for one in tokens]
    for index in range(max(map(len, items))):
        both = [one[index] if index < len(one) else None for one in items]
        if both[0] == both[1] or any(both[side] is not None and kind(side, index) == _UNUSED for side in (0, 1)):
            continue
        side = 0 if both[1] is None else 1
        if None in both and kind(side, index) in _ADDED:
            continue
        shown = [text.decode("utf-8", "replace") if text is not None else None for text in both]
        if None in shown:
            return f"token {shown[side]!r} (id {index}) of {names[side]} is unknown to {names[1 - side]}"
        return f"token {index} is {shown[0]!r} in {names[0]} and {shown[1]!r} in {names[1]}"
    return ""


def _vocab_size(header: GgufHeader) -> int | None:
    # The tokens that are listed decide which ids exist, whatever the number says.
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if tokens is not None else header.of_architecture("vocab_size")


def _attention(header: GgufHeader) -> dict[str, Any]:
    """Layer types and the shape of each layer's keys and values."""
    get = header.of_architecture
    layers, pattern = get("block_count"), get("attention.sliding_window_pattern")
    heads, dim = get("attention.head_count_kv"), get("attention.key_length")
    queries = get("attention.head_count")
    # Without ``key_length`` the width is divided among the query heads, as llama.cpp does.
    if dim is None and get("embedding_length") and isinstance(queries, int) and queries > 0:  # 0: a recurrent model
        dim = get("embedding_length") // queries
    found: dict[str, Any] = {"num_key_value_heads": heads if isinstance(heads, int) else None, "head_dim": dim}
    if not layers or not isinstance(pattern, tuple) or len(pattern) < layers:
        return found
    window_dim = get("attention.key_length_swa", dim)
    own = heads if isinstance(heads, tuple) else (heads,) * layers
    found["layer_types"] = ["sliding_attention" if pattern[i] else "full_attention" for i in range(layers)]
    found["per_layer_config"] = {
        str(i): {"num_key_value_heads": own[i], "head_dim": window_dim if pattern[i] else dim} for i in range(layers)
    }
    found["num_key_value_heads"] = own[0]
    return found
