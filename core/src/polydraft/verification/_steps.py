"""Measuring on a stepping engine, with the logits that the rule sees and without any drafter."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise, repeat
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.noise import gumbel, row_keys
from polydraft.sampling.numpy_ops import NumpyOps, array_ops_of
from polydraft.sampling.structured import Grammars
from polydraft.verification._noise import GreedySampler, Logits, difference, epsilon_of, measure_noise, reroutes
from polydraft.verification._verdict import MARGIN_LIMIT, Tie

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from polydraft.contract.requests import TokenRequest
    from polydraft.contract.results import TokenLogprobs
    from polydraft.contract.stepping import Step, SteppingEngine

__all__ = ["measure_tie"]

_BEFORE, _AFTER = 48, 16
"""Positions before and after the difference that the noise is measured at: rows of a large vocabulary are megabytes."""

_Parts = tuple[tuple[int, bool], ...]
"""Where each part of a prompt ends, and whether it is run as a step; others are prefills."""

_ALONE = (*range(16), 24, 32)
"""Single steps before the position, after prefills of other lengths, where plain decoding is repeated."""
_MIXED = 16
"""Ways to cut the output into steps of mixed lengths, tried where no other control chooses the other token."""

_CONTEXT = 3
"""The noise on another context is measured on this many blocks from the start of the text: short, so that it lies
inside any sliding window, where a defect of the KV cache cannot widen the tolerance."""


def measure_tie(
    engine: SteppingEngine,
    request: TokenRequest,
    expected: Sequence[int],
    found: Sequence[int],
    position: int,
    k: int,
    *,
    precision: str = "",
    experts: bool = False,
    reused: int = 0,
    stepped: Sequence[tuple[int, int]] = (),
    rounds: Sequence[int] = (),
) -> Tie:
    """Score the plain output again: one token at a time, as plain decoding does, and in blocks of k+1 tokens.

    The blocks are the control. They hold what plain decoding chose; no drafter takes part, nor a rollback in the noise.
    The output is run once for each place that the position can have in its block. If an engine's blocks are wrong,
    their own error would widen the tolerance; so their noise is compared with what rounding explains
    (``Tie.explained``). With ``rounds``, the control also runs the output in steps of as many tokens as these had: what
    sums an earlier step was computed in is in the KV of all later ones. Where none of all these chooses the other
    token of a near tie, the control also runs blocks of 2 to k tokens, as rounds of fewer drafts do, and steps of mixed
    lengths, as a drafter makes them that does not always find drafts, with and without tokens that are taken back: how
    many tokens a step runs, and which of them a token is, decides in which order sums are made.

    In a mixture of experts, rounding may send one token to other experts: its logits are far off, and those around it
    are not. Where the control chooses the other token, but the two are further apart than the noise around them, plain
    decoding is repeated (``Tie.noise_alone``): this position always by a step of one token, those before it by prefills
    of other lengths and by steps of several tokens. What is wrong with longer steps at this one position is not in it.

    Where one of the outputs took over KV of an earlier turn, that has been computed in other sums than those of one
    prefill: by prefills of parts, and by decoding steps. The control then also runs the prompt so, in a new sequence:
    its reused tokens in a prefill of their own; in a prefill and blocks, from a few places on; and with ``stepped``, in
    prefills and blocks where the earlier turns had them.

    Args:
        engine: The engine; new sequences are opened, one at a time.
        request: What was generated: prompt, settings, seed. Filters (top_k, top_p, min_p, typical_p) are applied in the
            control's choices, but are not part of the margin; ``Tie.cut`` says where they decide.
        expected: Plain output.
        found: The other output.
        position: Index of the first token that differs; both have one there.
        k: The other output's number of speculative tokens, at most ``engine.max_draft_tokens``.
        precision: Of ``session.running``; names of quantised weights count as bfloat16.
        experts: Whether the target is a mixture of experts.
        reused: Leading tokens of the prompt that were taken over.
        stepped: The spans of these, start and end, that decoding steps had computed; in order, empty: not known.
        rounds: How many tokens each round of the other output gave, the prefill's first; empty: not known.
    """
    output = list(expected[: position + _AFTER])
    shown = range(max(0, position - _BEFORE), len(output))
    plain, raw = {}, {}
    for row in _run(engine, request, output, _cuts(output, 1, 0), shown):
        plain[row.index], raw[row.index] = row.seen, row.raw
    tokens = (expected[position], found[position])
    terms = _noise_terms(request, len(request.prompt_token_ids) + position, tokens)

    def ahead(row: Logits) -> float:
        """By how much the expected token is ahead."""
        return float(row[tokens[0]]) - float(row[tokens[1]]) + terms[0] - terms[1]

    noise: list[float] = []
    noise_here: list[float] = []
    steps: list[float] = []
    control: list[int] = []
    margin = ahead(plain[position])
    settings = request.settings
    filtered = bool(settings.top_k or settings.top_p < 1.0 or settings.min_p or settings.typical_p < 1.0)
    # The expected token was chosen though it was behind: a filter had removed the other one.
    cut = filtered and margin < 0
    blocks = [_cuts(output, k + 1, offset) for offset in range(k + 1)]
    if sum(rounds) > position:
        ends = {total - 1 for total in accumulate(rounds)}
        blocks.append(sorted({0, *(end for end in ends if end < len(output) - 1), len(output) - 1}))
    controls: list[tuple[Sequence[int], _Parts]] = [(cuts, ()) for cuts in blocks]
    if reused:
        ways = {_parts(reused, stepped, repeat(size)) for size in range(1, k + 2)} | {((reused, False),)}
        controls += [(cuts, way) for way in sorted(ways) for cuts in [_cuts(output, 1, 0), *blocks]]
        places = sorted({1, max(1, reused // 2)})
        ways = {_parts(reused, [(place, reused)], repeat(size)) for place in places for size in range(1, k + 2)} - ways
        controls += [(blocks[0], way) for way in sorted(ways)]
    for cuts, parts in controls:
        for row in _run(engine, request, output, cuts, shown, parts):
            gap = difference(plain[row.index], row.seen)
            # Rounding is judged before settings scale the logits: they may shrink a defect, or blow rounding up.
            steps.append(difference(raw[row.index], row.raw))
            if row.index == position:
                control.append(row.choice)
                noise_here.append(gap)
                # Likewise in the control: the other token was chosen from behind.
                cut = cut or (filtered and row.choice == tokens[1] and ahead(row.seen) > 0)
            elif row.index > 0 or parts:  # index 0 comes from the same prefill in both
                noise.append(gap)
    # Rows of other positions may agree bit by bit where those of this one do not.
    epsilon = epsilon_of(precision) if precision else 0.0
    roundings = [epsilon * abs(float(raw[position][token])) for token in tokens]
    most = max(*noise, *roundings) if noise else None
    if tokens[1] not in control and most is not None and abs(margin) <= MARGIN_LIMIT * most:
        # Rounds of fewer drafts are steps of fewer rows. What these differ by does not widen the tolerance.
        for cuts, parts, length in _further(output, k, reused, stepped):
            for row in _run(engine, request, output, cuts, shown, parts, length):
                steps.append(difference(raw[row.index], row.raw))
                control += [row.choice] * (row.index == position)
            if tokens[1] in control:
                break
    noise_alone = None
    if experts and reroutes(precision) and tokens[1] in control and abs(margin) > MARGIN_LIMIT * (most or 0.0):
        alone = _alone(engine, request, output, position, k)
        noise_alone = max((difference(raw[position], row) for row in alone), default=None)
    start = [*request.prompt_token_ids, *expected][: _CONTEXT * (k + 1)]
    return Tie(
        source="logits",
        values=(float(plain[position][tokens[0]]), float(plain[position][tokens[1]])),
        margin=margin,
        noise=most,
        noise_here=max(noise_here),
        noise_alone=noise_alone,
        steps=max(steps),
        explained=measure_noise(engine, start, k + 1).explains(precision, experts=experts),
        cut=cut,
        control=tuple(control),
    )


class _Replay(RuleSampler):
    """Chooses as the rule does, and shows the logits that the rule sees: biases, penalties and processors applied."""

    def __init__(self, engine: SteppingEngine, request: TokenRequest, dtype: str) -> None:
        grammar = Grammars(engine.tokenizer).run(request)
        super().__init__(array_ops_of(engine), request, dtype, grammar=grammar)
        self.seen: dict[int, Any] = {}
        """Absolute position -> logits of the last step, the engine's arrays of shape (1, vocab)."""
        self.raw: dict[int, Any] = {}
        """The same as the engine gave them."""

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """Choose for every row, whatever the rows before it chose."""
        rows = self.processed(logits, first_position, run_token_ids)
        self.seen = dict(enumerate(rows, first_position))
        self.raw = {first_position + row: logits[row : row + 1] for row in range(len(rows))}
        return [self._one(row, position) for position, row in self.seen.items()], None

    def _one(self, row: Any, position: int) -> int:
        forced = self._forced.get(position)
        return self._pick_one(row, position) if forced is None else forced


@dataclass(frozen=True, slots=True)
class _Row:
    """Logits and choice for one output token."""

    index: int
    """Of the output."""
    seen: Logits
    """Logits as the rule sees them; shape (vocab,)."""
    raw: Logits
    """The same before biases, penalties and processors."""
    choice: int
    """The rule's choice."""


def _run(
    engine: SteppingEngine,
    request: TokenRequest,
    output: Sequence[int],
    cuts: Sequence[int],
    shown: range,
    parts: _Parts = (),
    length: int = 0,
) -> Iterator[_Row]:
    """Run prompt and output, this in blocks, whose edges are ``cuts``; yields the rows in ``shown``.

    ``parts``: those that the prompt is run in before the rest of it. ``length``: tokens that a step runs at least;
    those after its block are taken back.
    """
    ops, prompt = array_ops_of(engine), request.prompt_token_ids
    with (
        closing(_Replay(engine, request, engine.running.dtype)) as sampler,
        closing(engine.open_sequence()) as sequence,
    ):

        def rows(step: Step, first: int) -> Iterator[_Row]:
            for index, choice in enumerate(step.token_ids, first):
                if index in shown:
                    seen, raw = sampler.seen[len(prompt) + index], sampler.raw[len(prompt) + index]
                    yield _Row(index, ops.numpy(seen)[0], ops.numpy(raw)[0], choice)

        # Prefill chooses output token 0, and the step that runs output token i chooses token i + 1.
        ignored, at = GreedySampler(engine), 0
        for end, is_step in parts:
            (sequence.verify if is_step else sequence.prefill)(prompt[at:end], ignored)
            at = end
        yield from rows(sequence.prefill(prompt[at:], sampler), 0)
        for start, end in pairwise(cuts):
            step = sequence.verify(output[start : max(end, min(start + length, len(output)))], sampler)
            yield from islice(rows(step, start + 1), end - start)
            if start + length > end:
                sequence.rollback(len(prompt) + end)


def _cuts(output: Sequence[int], block: int, offset: int) -> list[int]:
    """The edges of blocks, the first of ``offset`` tokens, if any. Nothing is chosen after the last token."""
    return sorted({0, *range(offset, len(output) - 1, block), len(output) - 1})  # a set: an offset of 0 is an edge, too


def _further(
    output: Sequence[int], k: int, reused: int, stepped: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[int], _Parts, int]]:
    """Ways to run output and prompt, as ``_run`` takes them.

    In blocks of 2 to k tokens from each offset, then in steps of mixed lengths; of these every other way runs k+1
    tokens in each step and takes back those that are too many, as a round does with rejected drafts.
    """
    for size in range(2, k + 1):
        yield from ((_cuts(output, size, offset), (), 0) for offset in range(size))
    draw = Random(reused)
    lengths = iter(lambda: draw.randint(1, k + 1), 0)  # without end
    for number, cuts in enumerate(islice(_mixed(output, k), 2 * _MIXED)):
        parts: _Parts = ()
        if reused:
            parts = _parts(reused, stepped or [(draw.randint(1, reused), reused)], lengths)
        yield cuts, parts, (k + 1) * (number % 2)


def _mixed(output: Sequence[int], k: int) -> Iterator[list[int]]:
    """The edges of steps of 1 to k+1 tokens in random order, without end. Nothing is chosen after the last token."""
    draw, last = Random(len(output)), len(output) - 1
    while True:
        cuts = [0]
        while cuts[-1] < last:
            cuts.append(min(cuts[-1] + draw.randint(1, k + 1), last))
        yield cuts


def _alone(
    engine: SteppingEngine, request: TokenRequest, output: Sequence[int], position: int, k: int
) -> Iterator[Logits]:
    """Raw logits of one position, always by a step of one token, after others that are run in several ways.

    By prefills of other lengths, and in two parts; by steps of k+1 tokens from each offset, and of mixed lengths.
    """
    tokens = [*request.prompt_token_ids, *output[:position]]  # the last one's row chooses for the position
    prompt, last = len(request.prompt_token_ids), len(tokens) - 1
    ends = sorted({last - step for step in _ALONE} & set(range(prompt + 1, last + 1)))
    ways: list[tuple[Sequence[int], Sequence[int]]] = [((end,), range(end, last + 1)) for end in ends]
    parts = sorted({1, prompt // 3, prompt // 2, prompt - 1} & set(range(1, prompt)))
    ways += [((part, prompt), range(prompt, last + 1)) for part in parts]
    if prompt < last:
        before = output[:position]
        blocks = [_cuts(before, k + 1, offset) for offset in range(k + 1)]
        blocks += islice(_mixed(before, k), _MIXED // 2)
        ways += [((prompt,), [prompt + cut for cut in cuts]) for cuts in blocks]
    for prefills, steps in ways:
        sampler = GreedySampler(engine)
        with closing(engine.open_sequence()) as sequence:
            for start, stop in pairwise((0, *prefills)):
                sequence.prefill(tokens[start:stop], sampler)
            for start, stop in pairwise((*steps, last + 1)):
                sequence.verify(tokens[start:stop], sampler)
        yield sampler.rows[-1].copy()


def _parts(length: int, stepped: Iterable[tuple[int, int]], sizes: Iterator[int]) -> _Parts:
    """The first ``length`` tokens in parts: these spans in steps of so many tokens, the first one and others not."""
    parts: list[tuple[int, bool]] = []
    at = 0
    for begin, stop in stepped:
        start, end = max(1, begin), min(stop, length)
        if start < end:
            parts += [(start, False)] * (start > at)
            at = max(start, at)
            while at < end:
                at = min(at + next(sizes), end)
                parts.append((at, True))
    return (*parts, *[(length, False)] * (at < length))


def _noise_terms(request: TokenRequest, position: int, token_ids: tuple[int, int]) -> tuple[float, float]:
    """Gumbel noise times the temperature, which sampling adds to the two tokens' logits."""
    if request.settings.temperature == 0.0:
        return 0.0, 0.0
    ops = NumpyOps()
    ids = np.array([token_ids], dtype=np.int64)
    low, high = row_keys(request.seed, request.stream, range(position, position + 1))
    noise = gumbel(ops, ids, (ops.column(low, ids), ops.column(high, ids)))[0] * request.settings.temperature
    return float(noise[0]), float(noise[1])
