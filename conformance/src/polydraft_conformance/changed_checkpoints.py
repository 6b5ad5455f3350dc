"""Copies of checkpoints with changed weights, for tests of how an engine reads what users have. Needs no engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from polydraft.checkpoints.safetensors import header

__all__ = ["NEW_TOKENS", "Tensors", "change_config", "change_tensors", "more_tokens", "own_head"]

NEW_TOKENS = tuple(f"<|new{index}|>" for index in range(8))
"""The tokens that ``more_tokens`` adds; every second one is special."""

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype as safetensors names it, shape, and the values, row by row."""


def change_config(folder: Path, **fields: object) -> None:
    """Set fields of ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Read ``model.safetensors``, let ``change`` edit the tensors, and write them back."""
    file = folder / "model.safetensors"
    entries, data = header(file), file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    metadata = entries.pop("__metadata__", {"format": "pt"})
    tensors: Tensors = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        tensors[name] = entry["dtype"], list(entry["shape"]), data[start + first : start + last]
    change(tensors)
    described, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape, values) in tensors.items():
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(values)]}
        end += len(values)
    head = json.dumps(described).encode()
    # Padded, so that the tensors are aligned.
    head += b" " * (-len(head) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(values for _, _, values in tensors.values()))


def more_tokens(source: Path, folder: Path) -> Path:
    """A copy of a target with ``NEW_TOKENS``, whose embeddings are those of tokens 300 and following."""
    shutil.copytree(source, folder)

    def add(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
            dtype, (rows, width), values = tensors[name]
            size = len(values) // rows
            new = values[300 * size : (300 + len(NEW_TOKENS)) * size]
            tensors[name] = dtype, [rows + len(NEW_TOKENS), width], values + new

    change_tensors(folder, add)
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    change_config(folder, vocab_size=size + len(NEW_TOKENS))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        {"id": size + index, "content": token, "special": index % 2 == 0, **plain}
        for index, token in enumerate(NEW_TOKENS)
    ]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def own_head(source: Path, folder: Path, *, equal: bool, tied: bool) -> Path:
    """A copy of a checkpoint that stores an output head next to its embedding, whatever its config says.

    Args:
        source: A checkpoint with a tied head.
        folder: Where the copy goes.
        equal: Whether the head is the embedding; else its rows are in reverse order.
        tied: What ``tie_word_embeddings`` says.
    """
    shutil.copytree(source, folder)

    def add(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        dtype, shape, values = tensors[name]
        size = len(values) // shape[0]
        rows = [values[at : at + size] for at in range(0, len(values), size)]
        tensors["lm_head.weight"] = dtype, shape, values if equal else b"".join(reversed(rows))

    change_tensors(folder, add)
    change_config(folder, tie_word_embeddings=tied)
    return folder
