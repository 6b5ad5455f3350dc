"""Compare the tokens of two models by their ``tokenizer.json`` or GGUF files; needs no tokenizer library."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.checkpoints.gguf import read_header
from polydraft.checkpoints.gguf_config import different_tokens
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
    added: frozenset[str]
    merges: list[str]
    scores: list[float]


def check_tokens(target: Path, drafter: Path, *, names: tuple[str, str] = ("the target", "the drafter")) -> None:
    """Check that two checkpoints turn the same text into the same token ids.

    Equal sizes prove nothing (vocabularies are padded), so the tokens, the merge rules (or scores) and the added tokens
    are compared. One of them may have further added tokens, as models have that were trained further, if the other has
    no token of that id: such a token is never drafted, or never accepted.

    Args:
        target: Its ``tokenizer.json`` or GGUF file.
        drafter: The drafter's file of the same kind.
        names: Those of the models in the sentence.

    Raises:
        PairMismatchError: A token differs; the sentence names one.
        ModelFormatError: A file cannot be read.
    """
    # Equal bytes need no parsing.
    if target.name == TOKENIZER_FILE and filecmp.cmp(target, drafter, shallow=False):
        return
    if target.name == TOKENIZER_FILE:
        difference = first_difference(_load(target), _load(drafter), names=names)
    else:
        difference = different_tokens(read_header(target, names[0]), read_header(drafter, names[1]), names)
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
    if difference := _different_token(ours, theirs, names):
        return difference
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


def _different_token(ours: _Tokens, theirs: _Tokens, names: tuple[str, str]) -> str:
    for token, index in sorted(ours.ids.items() - theirs.ids.items(), key=lambda item: item[1]):
        if token in theirs.ids:
            return f"token {token!r} has id {index} in {names[0]} and {theirs.ids[token]} in {names[1]}"
    for one, other, (name, other_name) in ((ours, theirs, names), (theirs, ours, names[::-1])):
        taken = set(other.ids.values())
        for token, index in sorted(one.ids.items() - other.ids.items(), key=lambda item: item[1]):
            if token not in one.added or index in taken:
                return f"token {token!r} (id {index}) of {name} is unknown to {other_name}"
    return ""


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
    added = {str(token["content"]): int(token["id"]) for token in data.get("added_tokens") or ()}
    ids.update(added)
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in model.get("merges") or ()]
    kind = str(model.get("type") or ("BPE" if merges else "other"))
    return _Tokens(kind, ids, frozenset(added), merges, scores)
