"""Two outputs token by token, and a message that says where and by how much they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polydraft_conformance.counting import stepping_engine
from polydraft_conformance.primitives import prefill_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import Tokenizer
    from polydraft.session.base import Session

__all__ = ["Comparison", "Verdict", "compare", "first_difference"]

Verdict = Literal["EXACT", "NEAR_TIE", "DIVERGED"]
"""``NEAR_TIE`` is given to nothing yet: without a control that flips too, a difference is a defect."""

_AROUND = 8
"""Tokens shown on each side of a difference."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing two outputs."""

    verdict: Verdict
    position: int | None = None
    """Index of the first output token that differs."""
    message: str = ""


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Index of the first token that differs, the shorter one's end included; None if they are equal."""
    for index, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def compare(
    session: Session,
    prompt_token_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    *,
    names: tuple[str, str] = ("plain", "speculative"),
    with_logits: bool = True,
) -> Comparison:
    """Compare the outputs of one prompt.

    Args:
        session: Gives texts of tokens, and logits where its engine exposes them.
        prompt_token_ids: The prompt.
        expected: The output that counts.
        found: The output that must equal it.
        names: What the two are called in the message.
        with_logits: Whether the target's greedy logits say anything about the choice.
    """
    position = first_difference(expected, found)
    if position is None:
        return Comparison("EXACT")
    engine = stepping_engine(session)
    tokenizer = session.tokenizer
    context = [*prompt_token_ids, *expected[:position]]
    tokens = [tokens[position] if position < len(tokens) else None for tokens in (expected, found)]
    lines = [
        f"The outputs differ at output token {position} (absolute position {len(context)}) of {len(expected)}.",
        *(f"{name}: {_token(token, tokenizer)}" for name, token in zip(names, tokens, strict=True)),
        f"before: {_text(context[-_AROUND:], tokenizer)}",
        *(
            f"{name} goes on: {_text(tokens[position : position + _AROUND], tokenizer)}"
            for name, tokens in zip(names, (expected, found), strict=True)
        ),
    ]
    if with_logits and engine is not None and None not in tokens:
        row = prefill_logits(engine, context)[-1]
        values = [float(row[token]) for token in tokens if token is not None]
        lines.append(
            f"target's logits after one prefill of the context: {names[0]} {values[0]:.6f}, {names[1]} {values[1]:.6f} "
            f"(margin {values[0] - values[1]:.3g}; largest {float(row.max()):.6f} of token {int(row.argmax())})"
        )
    return Comparison("DIVERGED", position, "\n".join(lines))


def _token(token: int | None, tokenizer: Tokenizer) -> str:
    if token is None:
        return "ended"
    return f"token {token} {_text([token], tokenizer)}"


def _text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    return repr(b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8", "replace"))
