"""Independent rejection sampling: the opt-in rule of acceptance, which is not seed-identical.

Leviathan et al. 2023 (arXiv:2211.17192), Algorithm 1, and section 2.3: a draft x, drawn from q, is accepted with
probability min(1, p(x) / q(x)); otherwise a token is drawn from max(p - q, 0), normalised (the residual distribution).
The output is distributed as p, the target's distribution. p and q are taken after all settings. A draft that was not
drawn here, such as an n-gram's, has q = 1, which is right for any drafter that does not see the noise. Replacing a
draft that was drawn here is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polydraft.errors import EngineError
from polydraft.sampling._host import choose_on_host, kept_on_host
from polydraft.sampling._logprobs import token_logprobs
from polydraft.sampling._sampler import NOT_CHOSEN, RuleSampler
from polydraft.sampling._soundness import UNSOUND, largest_logits
from polydraft.sampling.noise import gumbel, row_keys
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import choose_tokens

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps
    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.results import TokenLogprobs
    from polydraft.sampling._grammar import GrammarRun

__all__ = ["RejectionSampler", "make_sampler"]

# Noise streams of the three uses, so that draws are independent. The streams of requests are small numbers.
_DRAFT, _ACCEPT, _REST = 1 << 40, 2 << 40, 3 << 40
_AGAIN = 1 << 32  # from one stream to the next, where several drafts are drawn for one position
_OPS = NumpyOps()

Probabilities = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Ascending token ids, and their probabilities; all others are 0."""


def make_sampler(
    ops: ArrayOps[Any],
    request: TokenRequest,
    dtype: str = "",
    vocab_size: int = 0,
    grammar: GrammarRun | None = None,
) -> RuleSampler:
    """The sampler that a generation's settings ask for. Greedy and plain decoding need no rejection."""
    settings = request.settings
    if settings.acceptance == "rejection" and settings.temperature > 0.0 and request.speculate:
        return RejectionSampler(ops, request, dtype, vocab_size, grammar)
    return RuleSampler(ops, request, dtype, vocab_size, grammar)


class RejectionSampler(RuleSampler):
    """A ``RuleSampler`` that chooses an accepted draft, or a token of the residual distribution for a rejected one.

    So the loop, which accepts drafts while they equal the choices, needs no other rule. Rows after the first rejected
    draft are not chosen. The token after the prompt and the bonus token are chosen by the ordinary rule.
    """

    def __init__(
        self,
        ops: ArrayOps[Any],
        request: TokenRequest,
        dtype: str = "",
        vocab_size: int = 0,
        grammar: GrammarRun | None = None,
    ) -> None:
        super().__init__(ops, request, dtype, vocab_size, grammar)
        self._drawn: dict[int, tuple[int, Probabilities]] = {}  # position -> token, and what it was drawn from
        self._on_device: dict[int, tuple[Any, Any]] = {}  # the same before the host has seen it: logits
        self._draws: dict[int, int] = {}  # position -> how often a draft was drawn for it

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """Draw a draft with independent noise, and remember its distribution.

        Of several draws for one position the last counts. Each has fresh noise, since the logits of one may depend on
        the draw before it.
        """
        changed = self._draft_logits(logits, position, run_token_ids)
        self._drawn.pop(position, None)
        self._on_device.pop(position, None)
        if changed is None:
            # Forced, or after a forbidden prefix: nothing was drawn, so no distribution is remembered.
            return self._constant(self._forced.get(position, NOT_CHOSEN), logits)
        ops, raw, draft = changed
        draws = self._draws[position] = self._draws.get(position, -1) + 1
        stream = self._stream + _DRAFT + draws * _AGAIN
        if ops is self._ops:  # on a device
            chosen = choose_tokens(ops, draft, self._settings, self._seed, stream, position)
            self._remember(ops, largest_logits(ops, raw), position)
            self._on_device[position] = chosen, draft * 1.0  # a copy: the engine may write over it
            return chosen
        drawn = choose_on_host(draft, self._settings, self._seed, stream, position)
        self._remember(ops, self._telling(ops, raw, draft, drawn), position)
        token_id = int(drawn[0])
        # Otherwise there is no distribution, and the draft counts as certain (q = 1).
        if np.isfinite(draft.max()):
            self._drawn[position] = token_id, self._distribution(draft[0])
        return self._constant(token_id, logits)

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """The accepted drafts, then one token of the target's; ``NOT_CHOSEN`` for the rows after it.

        ``UNSOUND``, and errors, as for the ordinary rule; and a draft from such a row is refused if it is verified.
        """
        run_token_ids = self._checked_rows(logits, first_position, run_token_ids)
        self._start_step(first_position, run_token_ids)
        host, rows = self._on_host(logits)
        largest = host.tolist(largest_logits(host, rows))
        ops, rows = (self._ops, logits) if self._processor is not None else (host, rows)
        # Row i verifies the draft that was run after it. The last row has none: it gives the bonus token.
        drafts = [*run_token_ids[1:], None]
        token_ids: list[int] = []
        for row, draft in enumerate(drafts):
            position, own = first_position + row, rows[row : row + 1]
            if not math.isfinite(largest[row]):
                token_ids.append(UNSOUND)
            elif position in self._forced:
                token_ids.append(self._forced[position])
            else:
                if self._processor is not None:
                    changed = self._process(self._processor, own, position, run_token_ids[: row + 1], certain=True)
                else:
                    changed = self._adjusted(ops, own, position, run_token_ids[: row + 1])
                if changed is None:  # nothing follows the end, which has been accepted
                    break
                self._check_left(ops, changed, position)
                self._check_draft(position)
                token_ids.append(self._decide(ops, changed, position, draft))
            # The rows after a rejected draft saw a wrong prefix.
            if token_ids[-1] != draft:
                break
        # Positions after the rejected draft are drafted again in the next round.
        self._drawn.clear()
        self._on_device.clear()
        self._draws.clear()
        token_ids += [NOT_CHOSEN] * (len(drafts) - len(token_ids))
        self._check_step(ops, rows, token_ids, first_position, run_token_ids)
        if self._settings.logprobs is None or not keep_logprobs:
            return token_ids, None
        return token_ids, token_logprobs(self._ops.numpy(logits), token_ids, self._settings.logprobs)

    def _decide(self, ops: ArrayOps[Any], logits: Any, position: int, draft: int | None) -> int:
        """The token for one row (1, vocab) of logits, after all settings."""
        if draft is None:
            return self._pick_one(logits, position) if ops is self._ops else int(self._pick(ops, logits, position)[0])
        token_ids, target = self._distribution(ops.numpy(logits)[0])
        drafted = self._drafted(ops, position, draft)
        # p(draft) / q(draft); the draft was drawn from q, so q(draft) > 0
        chance = _at(token_ids, target, np.array([draft]))[0] / _at(*drafted, np.array([draft]))[0]
        # ``chance`` may exceed 1: the draft is then always accepted, as min(1, p / q) asks.
        if self._uniform(position) < chance:
            return draft
        rest = target - _at(*drafted, token_ids)  # p - q; negative entries are dropped below
        # A rejected draft has p < q, so its residual is exactly 0, whatever rounding left of it.
        rest[token_ids == draft] = 0.0
        if not (rest > 0.0).any():  # p and q differ by rounding only
            return draft
        # Gumbel-max on the residual: normalising would only add a constant to every score.
        with np.errstate(divide="ignore"):
            scores = np.log(np.maximum(rest, 0.0)) + gumbel(_OPS, token_ids[None], self._keys(position, _REST))[0]
        return int(token_ids[scores.argmax()])

    def _drafted(self, ops: ArrayOps[Any], position: int, draft: int) -> Probabilities:
        """The distribution that the draft was drawn from."""
        # Copied to the host only when the draft is verified: drafting must not wait for the device.
        if position in self._on_device:
            chosen, logits = self._on_device[position]
            self._drawn[position] = int(ops.tolist(chosen)[0]), self._distribution(ops.numpy(logits)[0])
        if position not in self._drawn:
            return np.array([draft]), np.array([1.0])
        token_id, probabilities = self._drawn[position]
        if token_id != draft:
            raise EngineError(
                f"The engine replaced the draft token {token_id} by {draft} after it was drawn, so the distribution of "
                "its drafts is unknown.",
                "Use `acceptance='exact-match'`, and report it to the backend's authors.",
            )
        return probabilities

    def _distribution(self, logits: npt.NDArray[np.float32]) -> Probabilities:
        """The distribution that the ordinary rule draws from: one row, shape (vocab,)."""
        values, token_ids = kept_on_host(logits, self._settings)
        # float64: p - q is a difference of nearly equal numbers.
        weights = np.exp(values.astype(np.float64) - values.max())
        return token_ids, weights / weights.sum()

    def _keys(self, position: int, use: int) -> tuple[Any, Any]:
        low, high = row_keys(self._seed, self._stream + use, range(position, position + 1))
        return np.array([low]), np.array([high])

    def _uniform(self, position: int) -> float:
        """Between 0 and 1, both excluded."""
        bits = int(_OPS.noise_bits(np.zeros((1, 1), np.int64), *self._keys(position, _ACCEPT))[0, 0])
        # The midpoints of 2**23 equal intervals, so neither 0 nor 1.
        return (2 * bits + 1) * 2.0**-24


def _at(
    token_ids: npt.NDArray[np.int64], values: npt.NDArray[np.float64], wanted: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The values of the wanted ids; 0 for ids that are not in ``token_ids``."""
    # searchsorted may point past the end; the comparison below rejects the entry that is hit instead.
    found = np.minimum(np.searchsorted(token_ids, wanted), len(token_ids) - 1)
    return np.where(token_ids[found] == wanted, values[found], 0.0)
