"""Measuring on a stepping engine, with the logits that the rule sees and without any drafter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polydraft.contract.requests import GenerationSettings
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.noise import gumbel, row_keys
from polydraft.sampling.numpy_ops import NumpyOps, array_ops_of
from polydraft.verification._verdict import Tie

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from polydraft.contract.arrays import ArrayOps
    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.results import TokenLogprobs
    from polydraft.contract.stepping import Step, SteppingEngine

__all__ = ["measure_tie"]

_BEFORE, _AFTER = 48, 16
"""Positions before and after the difference that the noise is measured at: rows of a large vocabulary are megabytes."""

_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_ROUNDINGS = {"float64": 64.0, "float32": 64.0}
_HALF_ROUNDINGS = 16.0
"""So many roundings of the largest logit are no defect. Half precision has fewer: its sums are float32's."""
_PREFILLS = 16.0
"""Nor is so many times what a fresh prefill differs: an engine may compute in less than its dtype."""

Logits = npt.NDArray[np.float32]


def measure_tie(
    engine: SteppingEngine,
    request: TokenRequest,
    expected: Sequence[int],
    found: Sequence[int],
    position: int,
    k: int,
    *,
    dtype: str = "",
) -> Tie:
    """Score the plain output again: one token at a time, as plain decoding does, and in blocks of k+1 tokens.

    The blocks are the control. They hold what plain decoding chose, so neither a drafter nor a rollback takes part; the
    output is run once for each place that the position can have in its block. An engine whose blocks are wrong would be
    its own excuse, so that they are held against rounding as well.

    Args:
        engine: The engine; sequences of its own are opened, one at a time.
        request: What was generated: prompt, settings, seed. Filters (top_k, top_p, min_p) are applied in the control's
            choices, but are not part of the margin; ``Tie.cut`` says where they decide.
        expected: Plain output.
        found: The other output.
        position: Index of the first token that differs; both have one there.
        k: The other output's number of speculative tokens, at most ``engine.max_draft_tokens``.
        dtype: That of ``session.running``; one that is no float's (quantised weights) counts as bfloat16.
    """
    output = list(expected[: position + _AFTER])
    shown = range(max(0, position - _BEFORE), len(output))
    plain: dict[int, Logits] = {}
    raw: dict[int, Logits] = {}
    few = {max(1, shown.start), position, len(output) - 1} - {0}
    for row in _run(engine, request, output, 1, 0, shown):
        plain[row.index] = row.seen
        if row.index in few:
            raw[row.index] = row.raw()
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
    steps: list[float] = []
    for offset in range(k + 1):
        for row in _run(engine, request, output, k + 1, offset, shown):
            if row.index == position:
                control.append(row.choice)
                cut = cut or (filtered and row.choice == tokens[1] and ahead(row.seen) > 0)
            elif row.index > 0:  # index 0 is the prefill's in both
                noise.append(_difference(plain[row.index], row.seen))
            if row.index in raw:
                steps.append(_difference(raw[row.index], row.raw()))
    return Tie(
        source="logits",
        values=(float(plain[position][tokens[0]]), float(plain[position][tokens[1]])),
        margin=margin,
        noise=max(noise, default=None),
        steps=max(steps, default=None),
        rounding=_rounding(engine, request, output, raw, dtype) if raw else None,
        cut=cut,
        control=tuple(control),
    )


class _Replay(RuleSampler):
    """Chooses as the rule does, and shows the logits that the rule sees: biases, penalties and processors applied."""

    def __init__(self, ops: ArrayOps[Any], request: TokenRequest) -> None:
        super().__init__(ops, request)
        self.seen: dict[int, Any] = {}
        """Absolute position -> logits of the last step, the engine's arrays of shape (1, vocab)."""
        self.raw: dict[int, Any] = {}
        """The same as the engine gave them."""

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """See ``polydraft.contract.Sampler.choose``. No row is left out, whatever the rows before it chose."""
        rows = self.processed(logits, first_position, run_token_ids)
        self.seen = dict(enumerate(rows, first_position))
        self.raw = {first_position + row: logits[row : row + 1] for row in range(len(run_token_ids))}
        return [self._one(row, position) for position, row in self.seen.items()], None

    def _one(self, row: Any, position: int) -> int:
        forced = self._forced.get(position)
        return self._pick_one(row, position) if forced is None else forced


@dataclass(frozen=True, slots=True)
class _Row:
    """What one token of the output is chosen from."""

    index: int
    """Of the output."""
    seen: Logits
    """As the rule sees them; shape (vocab,)."""
    raw: Callable[[], Logits]
    """As the engine gives them: until its next step."""
    choice: int
    """What the rule chooses."""


def _run(
    engine: SteppingEngine, request: TokenRequest, output: Sequence[int], block: int, offset: int, shown: range
) -> Iterator[_Row]:
    """Run prompt and output in blocks (the first of ``offset`` tokens, if any); yields the rows in ``shown``."""
    ops, prompt = array_ops_of(engine), request.prompt_token_ids
    run = output[:-1]  # nothing is chosen after the last token
    cuts = sorted({0, *range(offset, len(run), block), len(run)})
    with closing(_Replay(ops, request)) as sampler, closing(engine.open_sequence()) as sequence:

        def rows(step: Step, first: int) -> Iterator[_Row]:
            for index, choice in enumerate(step.token_ids, first):
                if index in shown:
                    place = len(prompt) + index
                    seen, raw = ops.numpy(sampler.seen[place])[0], partial(ops.numpy, sampler.raw[place][0])
                    yield _Row(index, seen, raw, choice)

        yield from rows(sequence.prefill(prompt, sampler), 0)
        for start, end in pairwise(cuts):
            yield from rows(sequence.verify(run[start:end], sampler), start + 1)


def _rounding(
    engine: SteppingEngine, request: TokenRequest, output: Sequence[int], raw: Mapping[int, Logits], dtype: str
) -> float:
    """How far logits may lie apart that should be the same: by the dtype, and by what fresh prefills give.

    Args:
        engine: See ``measure_tie``, as for ``request`` and ``dtype``.
        request: See there.
        output: Plain output.
        raw: Index of the output -> the logits that plain decoding chose from.
        dtype: See there.
    """
    name = dtype.rpartition(".")[2]
    largest = max(float(np.abs(row[np.isfinite(row)]).max(initial=0.0)) for row in raw.values())
    most = _HALF_ROUNDINGS * _EPSILON["bfloat16"] * largest
    limit = _ROUNDINGS.get(name, _HALF_ROUNDINGS) * _EPSILON.get(name, _EPSILON["bfloat16"]) * largest
    for index, row in raw.items():
        tokens = (*request.prompt_token_ids, *output[:index])
        plain = request.model_copy(update={"prompt_token_ids": tokens, "settings": GenerationSettings()})
        with closing(_Replay(array_ops_of(engine), plain)) as sampler, closing(engine.open_sequence()) as sequence:
            sequence.prefill(tokens, sampler)
            gap = _difference(row, array_ops_of(engine).numpy(sampler.raw[len(tokens)])[0])
            limit = max(limit, min(_PREFILLS * gap, most))  # a prefill can be as wrong as the blocks
    return limit


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
