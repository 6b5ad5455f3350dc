"""Compare the tokens of two models by their ``tokenizer.json``; needs no tokenizer library."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.errors import ModelFormatError, PairMismatchError
from polydraft.files import read_json, system_errors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["TOKENIZER_FILE", "check_tokens", "first_difference"]

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class _Tokens:
    kind: str
    ids: dict[str, int]
    merges: list[str]
    scores: list[float]


def check_tokens(target: Path, drafter: Path, *, names: tuple[str, str] = ("the target", "the drafter")) -> None:
    """Check that two checkpoints turn the same text into the same token ids.

    Equal sizes prove nothing (vocabularies are padded), so the tokens, the merge rules (or scores) and the added tokens
    of the ``tokenizer.json`` in both folders are compared. A model without that file is not checked. ``names`` are
    those of the models in the sentence.

    Raises:
        PairMismatchError: A token differs; the sentence names one.
        ModelFormatError: A ``tokenizer.json`` cannot be read.
    """
    files = (target / TOKENIZER_FILE, drafter / TOKENIZER_FILE)
    # Equal bytes need no parsing.
    if not all(file.is_file() for file in files) or filecmp.cmp(*files, shallow=False):
        return
    difference = first_difference(*(_load(file) for file in files), names=names)
    if difference:
        raise PairMismatchError(
            f"{names[0]} and {names[1]} do not have the same tokens: {difference}.",
            "Choose a drafter made for this target (`polydraft pairs` lists them), or `drafter='ngram'`.",
        )


def first_difference(
    target: Mapping[str, Any], drafter: Mapping[str, Any], *, names: tuple[str, str] = ("the target", "the drafter")
) -> str:
    """The first difference of two parsed ``tokenizer.json``, as part of a sentence; empty if they are equal."""
    ours, theirs = _tokens(target), _tokens(drafter)
    if ours.kind != theirs.kind:
        return f"{names[0]} has a {ours.kind} tokenizer, {names[1]} a {theirs.kind} one"
    if ours.ids != theirs.ids:
        return _different_token(ours.ids, theirs.ids, names)
    if ours.merges != theirs.merges:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours.merges, theirs.merges, strict=False)) if a != b),
            min(len(ours.merges), len(theirs.merges)),
        )
        rule = (ours.merges if at < len(ours.merges) else theirs.merges)[at]
        return f"merge rule {at} ({rule!r}) is not the same"
    if ours.scores != theirs.scores:
        return "the scores of their tokens differ"
    return ""


def _different_token(ours: Mapping[str, int], theirs: Mapping[str, int], names: tuple[str, str]) -> str:
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        other = theirs.get(token)
        if other is None:
            return f"token {token!r} (id {index}) of {names[0]} is unknown to {names[1]}"
        if other != index:
            return f"token {token!r} has id {index} in {names[0]} and {other} in {names[1]}"
    token, index = min(((t, i) for t, i in theirs.items() if t not in ours), key=lambda item: item[1])
    return f"token {token!r} (id {index}) of {names[1]} is unknown to {names[0]}"


def _load(file: Path) -> dict[str, Any]:
    try:
        with system_errors(f"{file} cannot be read"):
            data = read_json(file)
            _tokens(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ModelFormatError(f"{file} is not a tokenizer.json: {error!r}.", "Download the model again.") from error
    return dict(data)


def _tokens(data: Mapping[str, Any]) -> _Tokens:
    """Read the layouts of https://github.com/huggingface/tokenizers.

    BPE, WordPiece and WordLevel map token to id, Unigram lists (token, score); merges are ``"a b"`` in older files,
    ``["a", "b"]`` in newer ones.
    """
    model = data["model"]
    vocab = model.get("vocab") or {}
    ids: dict[str, int]
    scores: list[float] = []
    if isinstance(vocab, Mapping):
        ids = {str(token): int(index) for token, index in vocab.items()}
    else:
        # Unigram: the id is the index in the list.
        ids = {str(entry[0]): index for index, entry in enumerate(vocab)}
        scores = [float(entry[1]) for entry in vocab]
    # Added tokens last: they take precedence over the vocabulary.
    ids.update({str(token["content"]): int(token["id"]) for token in data.get("added_tokens") or ()})
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in model.get("merges") or ()]
    return _Tokens(str(model.get("type") or ("BPE" if merges else "other")), ids, merges, scores)
