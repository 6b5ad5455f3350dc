"""A difference between two outputs in words, and as data for the report: where, by how much, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft.verification import MARGIN_LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Tokenizer
    from polydraft.verification import Judgement, Tie

__all__ = ["describe"]

_AROUND = 8
"""Tokens shown on each side of a difference."""


def describe(
    judgement: Judgement,
    outputs: tuple[Sequence[int], Sequence[int]],
    names: tuple[str, str],
    *,
    prompt: Sequence[int],
    of: str,
    tokenizer: Tokenizer,
) -> tuple[str, dict[str, Any]]:
    """The message of a check, some lines, and the JSON-ready evidence.

    Args:
        judgement: On outputs that differ.
        outputs: The reference output, and the other one.
        names: What the two are called.
        prompt: The prompt of both.
        of: What the verdict holds for.
        tokenizer: Gives the texts of tokens.
    """
    position, tokens = judgement.position, judgement.tokens
    assert position is not None
    assert tokens is not None
    absolute = len(prompt) + position

    def text(token_ids: Sequence[int]) -> str:
        return repr(b"".join(tokenizer.token_bytes(token) for token in token_ids).decode("utf-8", "replace"))

    lines = [
        f"The outputs differ at output token {position} (absolute position {absolute}) of {len(outputs[0])}: "
        f"{judgement.verdict}. {judgement.reason}",
        f"of: {of}",
        *(
            f"{name}: ended" if token is None else f"{name}: token {token} {text([token])}"
            for name, token in zip(names, tokens, strict=True)
        ),
        f"before: {text([*prompt, *outputs[0][:position]][-_AROUND:])}",
        *(
            f"{name} continues: {text(output[position : position + _AROUND])}"
            for name, output in zip(names, outputs, strict=True)
        ),
        _guess(*(output[position:] for output in outputs)),
        *(_measured(judgement, judgement.tie, names) if judgement.tie else []),
    ]
    evidence = {
        **judgement.model_dump(mode="json"),
        "of": of,
        "absolute_position": absolute,
        "names": list(names),
        "texts": [None if token is None else text([token]) for token in tokens],
        "margin_in_noise": judgement.margin_in_noise,
    }
    return "\n".join(line for line in lines if line), evidence


def _measured(judgement: Judgement, tie: Tie, names: tuple[str, str]) -> list[str]:
    """The measurements, one fact per line."""
    values = ["unknown" if value is None else f"{value:.6f}" for value in tie.values]
    noise = "unknown" if tie.noise is None else f"{tie.noise:.3g}"
    if tie.noise_alone is not None:
        noise += f", of single steps at this position {tie.noise_alone:.3g}"
    margin = "unknown" if tie.margin is None else f"{tie.margin:.3g}"
    if judgement.margin_in_noise is not None:
        margin += f" = {judgement.margin_in_noise:.3g} times the noise (a near tie has at most {MARGIN_LIMIT:g})"
    assert judgement.tokens is not None
    flipped = sum(token == judgement.tokens[1] for token in tie.control)
    return [
        f"{tie.source} in plain decoding: {names[0]} token {values[0]}, {names[1]} token {values[1]}; "
        f"margin {margin}; noise {noise}",
        f"control, the plain output in blocks of k+1 tokens without any drafter: {flipped} of {len(tie.control)} "
        f"choose the {names[1]} token",
    ]


def _guess(rest: Sequence[int], other: Sequence[int]) -> str:
    """The likely cause; ``rest`` is the reference output from the first difference on, ``other`` the other output."""
    # Equal after a shift by one, over at least two tokens: one alone may be a coincidence.
    shared = min(len(rest), len(other)) - 1
    if shared >= 2 and other[:shared] == rest[1 : 1 + shared]:
        return "It looks as if one token was left out."
    if shared >= 2 and rest[:shared] == other[1 : 1 + shared]:
        return "It looks as if one token was put in."
    return ""
