"""Measuring on a stepping engine, with the logits that the rule sees and without any drafter."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polydraft.sampling.chooser import RuleChooser
from polydraft.sampling.noise import gumbel, row_keys
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.verification.verdict import Tie

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.results import TokenLogprobs
    from polydraft.contract.stepping import Step, SteppingEngine
    from polydraft.sampling.ops import ArrayOps

__all__ = ["measure_tie"]

_BEFORE, _AFTER = 48, 16
"""Positions before and after the difference that the noise is measured at: rows of a large vocabulary are megabytes."""

Logits = npt.NDArray[np.float32]


def measure_tie(
    engine: SteppingEngine, request: TokenRequest, expected: Sequence[int], found: Sequence[int], position: int, k: int
) -> Tie:
    """Score the plain output again: one token at a time, as plain decoding does, and in blocks of k+1 tokens.

    The blocks are the control. They hold what plain decoding chose, so neither a drafter nor a rollback takes part; the
    output is run once for each place that the position can have in its block.

    Args:
        engine: The engine; sequences of its own are opened, one at a time.
        request: What was generated: prompt, settings, seed. Filters (top_k, top_p, min_p) are applied in the control's
            choices, but are not part of the margin; ``Tie.cut`` says where they decide.
        expected: Plain output.
        found: The other output.
        position: Index of the first token that differs; both have one there.
        k: The other output's number of speculative tokens, at most ``engine.max_draft_tokens``.
    """
    output = list(expected[: position + _AFTER])
    shown = range(max(0, position - _BEFORE), len(output))
    plain = {index: row for index, row, _ in _run(engine, request, output, 1, 0, shown)}
    tokens = (expected[position], found[position])
    terms = _noise_terms(request, len(request.prompt_token_ids) + position, tokens)

    def ahead(row: Logits) -> float:
        """By how much the expected token is ahead."""
        return float(row[tokens[0]]) - float(row[tokens[1]]) + terms[0] - terms[1]

    noise: list[float] = []
    control: list[int] = []
    margin = ahead(plain[position])
    settings = request.settings
    filtered = bool(settings.top_k or settings.top_p < 1.0 or settings.min_p)
    cut = filtered and margin < 0
    for offset in range(k + 1):
        for index, row, choice in _run(engine, request, output, k + 1, offset, shown):
            if index == position:
                control.append(choice)
                cut = cut or (filtered and choice == tokens[1] and ahead(row) > 0)
            elif index > 0:  # index 0 is the prefill's in both
                noise.append(_difference(plain[index], row))
    return Tie(
        source="logits",
        values=(float(plain[position][tokens[0]]), float(plain[position][tokens[1]])),
        margin=margin,
        noise=max(noise, default=None),
        cut=cut,
        control=tuple(control),
    )


class _Replay(RuleChooser):
    """Chooses as the rule does, and shows the logits that the rule sees: biases, penalties and processors applied."""

    def __init__(self, ops: ArrayOps[Any], request: TokenRequest) -> None:
        super().__init__(ops, request)
        self.seen: dict[int, Any] = {}
        """Absolute position -> logits of the last step, the engine's arrays of shape (1, vocab)."""

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """See ``polydraft.contract.Chooser.choose``. No row is left out, whatever the rows before it chose."""
        rows = self.processed(logits, first_position, run_token_ids)
        self.seen = dict(enumerate(rows, first_position))
        return [self._one(row, position) for position, row in self.seen.items()], None

    def _one(self, row: Any, position: int) -> int:
        forced = self._forced.get(position)
        return int(self._ops.tolist(self._choose(row, position))[0]) if forced is None else forced


def _run(
    engine: SteppingEngine, request: TokenRequest, output: Sequence[int], block: int, offset: int, shown: range
) -> Iterator[tuple[int, Logits, int]]:
    """Run prompt and output in blocks (the first of ``offset`` tokens, if any).

    Yields:
        For each index of the output in ``shown``: the index, the logits that it is chosen from, of shape (vocab,), and
        the token that the rule chooses from them.
    """
    ops, prompt = engine.array_ops, request.prompt_token_ids
    run = output[:-1]  # nothing is chosen after the last token
    cuts = sorted({0, *range(offset, len(run), block), len(run)})
    with closing(_Replay(ops, request)) as chooser, closing(engine.open_sequence()) as sequence:

        def rows(step: Step, first: int) -> Iterator[tuple[int, Logits, int]]:
            for index, choice in enumerate(step.token_ids, first):
                if index in shown:
                    yield index, ops.numpy(chooser.seen[len(prompt) + index])[0], choice

        yield from rows(sequence.prefill(prompt, chooser), 0)
        for start, end in pairwise(cuts):
            yield from rows(sequence.verify(run[start:end], chooser), start + 1)


def _difference(left: Logits, right: Logits) -> float:
    """Largest absolute difference of one logit; entries that are the same infinity do not differ."""
    with np.errstate(invalid="ignore"):
        gaps = np.abs(left.astype(np.float64) - right.astype(np.float64))
    gaps[left == right] = 0.0
    return float(gaps.max())


def _noise_terms(request: TokenRequest, position: int, token_ids: tuple[int, int]) -> tuple[float, float]:
    """What sampling adds to the two tokens' logits: Gumbel noise times the temperature."""
    if request.settings.temperature == 0.0:
        return 0.0, 0.0
    ops = NumpyOps()
    ids = np.array([token_ids], dtype=np.int64)
    low, high = row_keys(request.seed, request.stream, range(position, position + 1))
    noise = gumbel(ops, ids, (ops.column(low, ids), ops.column(high, ids)))[0] * request.settings.temperature
    return float(noise[0]), float(noise[1])
