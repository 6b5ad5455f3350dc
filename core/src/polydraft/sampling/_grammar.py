"""A grammar in one generation: which tokens may come after each prefix, drafts included."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from polydraft.errors import StructuredOutputError
from polydraft.sampling.numpy_ops import NumpyOps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set

    import numpy.typing as npt

    from polydraft.contract.arrays import ArrayOps

__all__ = ["GrammarRun", "forbid"]


class GrammarRun:
    """A matcher that is moved along the output and its drafts, and back.

    A mask has bit i of byte j for the token 8 j + i. That of a prefix is computed once: a draft's serves the target's
    row, too.

    Args:
        matcher: An ``llguidance.LLMatcher`` at its start.
        prompt_length: Positions from here on are output.
        ends: Tokens that end the output: nothing comes after them.
        lost: Called if llguidance gives up.
    """

    def __init__(self, matcher: Any, prompt_length: int, ends: Set[int], lost: Callable[[], None]) -> None:
        self._matcher = matcher
        self._lost = lost
        self._prompt_length = prompt_length
        self._ends = ends
        self._fed: list[int] = []  # output tokens that the matcher has consumed, and the end
        self._certain = 0  # how many of them are known to be committed
        self._masks: dict[int, npt.NDArray[np.uint8]] = {}  # number of consumed tokens -> mask of the next one

    def masks(self, committed: Sequence[int], run_token_ids: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """The masks of the rows that the grammar reaches: of all rows, or of those before a draft that it forbids.

        Args:
            committed: Tokens before ``run_token_ids``, prompt included.
            run_token_ids: The newest token and the drafts after it; row i follows the i-th.

        Returns:
            At least one.

        Raises:
            StructuredOutputError: llguidance gives up.
        """
        start = (
            len(committed) - self._prompt_length
        )  # output tokens before the run ones; below 0: some are the prompt's
        self._keep(committed, run_token_ids, start)
        found = []
        for index, token_id in enumerate(run_token_ids):
            length = max(start + index + 1, 0)
            if length > len(self._fed) and not self._advance(token_id):
                break
            # Nothing follows an end.
            if length and self._fed[length - 1] in self._ends:
                break
            found.append(self._mask(length))
        if not found:
            raise StructuredOutputError(
                f"The output goes on after token {run_token_ids[0]}, which `guided` does not allow there, or which "
                "ends it.",
                "This is a defect of polydraft or of the backend; report it.",
            )
        return found

    def forced(self, committed: Sequence[int], newest: int, most: int) -> list[int]:
        """Tokens that the grammar leaves no choice about, as the tokenizer would write them: at most ``most``."""
        found: list[int] = self._at(committed, newest).compute_ff_tokens()
        return found[:most]

    def allowed(self, committed: Sequence[int], newest: int, draft: list[int]) -> list[int]:
        """The leading tokens of a draft that the grammar takes."""
        return draft[: self._at(committed, newest).validate_tokens(draft)]

    def _at(self, committed: Sequence[int], newest: int) -> Any:
        """The matcher, moved to the newest token."""
        start = len(committed) - self._prompt_length
        self._keep(committed, [newest], start)
        if start + 1 > len(self._fed):
            self._advance(newest)
        self._back_to(start + 1)
        return self._matcher

    def _keep(self, committed: Sequence[int], run_token_ids: Sequence[int], start: int) -> None:
        """Go back to where the consumed tokens and the given ones part; then consume what is committed."""
        prompt, known = self._prompt_length, max(start, 0)
        # The committed part cannot have changed: comparing starts after it, so a call costs O(k), not O(length).
        common = min(self._certain, known, len(self._fed))
        for at in range(common, min(len(self._fed), start + len(run_token_ids))):
            if self._fed[at] != (committed[prompt + at] if at < known else run_token_ids[at - start]):
                self._back_to(at)
                break
        for at in range(len(self._fed), known):
            self._consume(committed[prompt + at])
        self._certain = known
        for length in [one for one in self._masks if one < known]:
            del self._masks[length]

    def _advance(self, token_id: int) -> bool:
        """Consume one more token if the grammar allows it."""
        length = len(self._fed)
        if length and self._fed[-1] in self._ends:
            return False
        mask = self._mask(length)
        if not token_id >> 3 < len(mask) or not mask[token_id >> 3] >> (token_id & 7) & 1:
            return False
        self._consume(token_id)
        return True

    def _consume(self, token_id: int) -> None:
        # A matcher that has come to its end takes an end-of-sequence token without counting it for ``rollback``.
        if token_id not in self._ends and not self._matcher.consume_token(token_id):
            self._raise()
        self._fed.append(token_id)

    def _back_to(self, length: int) -> None:
        past = len(self._fed) - length
        if past > 0:
            consumed = past - (self._fed[-1] in self._ends)
            if consumed and not self._matcher.rollback(consumed):
                self._raise()
            del self._fed[length:]
            for one in [one for one in self._masks if one > length]:
                del self._masks[one]

    def _mask(self, length: int) -> npt.NDArray[np.uint8]:
        mask = self._masks.get(length)
        if mask is None:
            self._back_to(length)
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if self._matcher.is_error():
                self._raise()
            # A grammar may name tokens by their ids, those that end the output among them.
            ends = [one for one in self._ends if one >> 3 < len(mask) and mask[one >> 3] >> (one & 7) & 1]
            if ends and not self._matcher.is_accepting():
                mask = mask.copy()
                for one in ends:
                    mask[one >> 3] &= 255 ^ (1 << (one & 7))
            self._masks[length] = mask
        return mask

    def _raise(self) -> None:
        self._lost()
        reason = in_short(self._matcher.get_error())
        raise StructuredOutputError(
            f"llguidance cannot follow the output any further: {reason or self._matcher.stop_reason()}.",
            "Give a simpler schema, expression or grammar.",
        )


def in_short(error: str) -> str:
    """An error of llguidance without the state of its parser, which it appends."""
    said = " ".join(error.split()).removeprefix("ERROR: ").partition(" <state>")[0].rstrip(".")
    return said if len(said) < 400 else f"{said[:400]}..."


def forbid(ops: ArrayOps[Any], logits: Any, masks: Sequence[npt.NDArray[np.uint8]]) -> Any:
    """The logits (rows, vocab) with ``-inf`` for the tokens that are not in the mask of their row: float32, a copy."""
    columns = logits.shape[1]
    if type(ops) is NumpyOps:
        changed = np.full(logits.shape, -np.inf, np.float32)
        for row, mask in enumerate(masks):
            # Logits may be padded beyond the vocabulary, and masks to whole words.
            bits = np.unpackbits(mask, count=min(columns, 8 * len(mask)), bitorder="little").view(np.bool_)
            np.copyto(changed[row, : len(bits)], logits[row, : len(bits)], where=bits)
        return changed
    words = np.zeros((len(masks), -(-columns // 32)), np.int64)
    for row, mask in enumerate(masks):
        known = mask.view("<u4")[: words.shape[1]]
        words[row, : len(known)] = known
    # (rows, vocab): from each token's word its bit. A mask of 32 KB goes to the device, not 1 MB of numbers.
    token_ids = ops.columns(logits)
    bits = (ops.take(ops.from_numpy(words, logits), token_ids >> 5) >> (token_ids & 31)) & 1
    return ops.where(bits > 0, ops.float32(logits), -math.inf)
