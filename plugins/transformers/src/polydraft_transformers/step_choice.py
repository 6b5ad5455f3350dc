# ruff: noqa: N803, ANN001, ANN202, PLR0124 - Triton's kernels have untyped arguments, and constants in capitals
# mypy: disable-error-code="import-not-found,no-untyped-call,no-untyped-def"
"""Choosing tokens within a recorded step on a GPU: by the core's rule, from numbers that lie on the device.

``polydraft.sampling.rule`` is the definition, and chooses where top_p has to sort all tokens. Without filters that sort
two kernels choose, and with a top_k three: each part of a row is narrowed down to its best tokens, and the last kernel
filters those. Their noise has the same bits: products and sums are rounded one by one, never fused. A drafter's head
with centroids joins in: most of its logits are one number, so they are not written, only compared.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from polydraft.sampling.noise import EXP_CONSTANTS, LOG_CONSTANTS, keys_at
from polydraft.sampling.rule import REACH, SHARE_ONE, RuleNumbers, as_float32, choose_by_numbers
from torch import Tensor
from torch.nn import functional

from polydraft_transformers.array_ops import TorchOps
from polydraft_transformers.launches import kernel
from polydraft_transformers.step_products import runs_kernels

if TYPE_CHECKING:
    from polydraft.sampling.on_device import DeviceChoice

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it along on Linux with CUDA only
    triton = None

__all__ = ["STATE", "ClusteredHead", "Kind", "accepted_by_chance", "choose", "kind_of", "noise_keys", "state_of"]

STATE = 6
"""Numbers of a state, int64: the newest token, its position, the noise's base, 1 / temperature and the logarithm of
min_p (float32 both, in one), top_p, and top_k."""
_SCALE, _MIN_P = 6, 7  # of the state seen as float32
_OPS = TorchOps()
_BLOCK = 2048  # columns of logits that a program reads
_CLUSTER_ROWS = 32  # tokens of a cluster whose logits a program computes
_MOST_BEST = 256  # the largest top_k that is narrowed down to
_RANKED = 16  # centroids that a program ranks


class Kind(NamedTuple):
    """Of a choice: what decides which operations run. All other numbers are in the state."""

    sampled: bool
    kept: int = 0
    """Tokens that parts of a row are narrowed down to: of some values of top_k the largest, a power of two."""
    sorted: int | None = None
    """The top_k of a choice that sorts more tokens than that (0: all), for which there is no kernel; None: there is."""
    top_p: bool = False
    min_p: bool = False
    chance: float | None = None
    """For measurements: that a draft is accepted, whatever is chosen; None: by the rule."""
    timed: bool = False
    """For measurements: whether its round notes when its parts end."""


def kind_of(choice: DeviceChoice) -> Kind:
    """The kind of a generation's choices."""
    numbers = choice.numbers
    if numbers is None:
        return Kind(sampled=False)
    few = 0 < numbers.top_k <= _MOST_BEST
    return Kind(
        sampled=True,
        kept=max(2, 1 << (numbers.top_k - 1).bit_length()) if few else 0,
        sorted=None if few or not (numbers.top_k or numbers.top_p is not None) else numbers.top_k,
        top_p=numbers.top_p is not None,
        min_p=numbers.min_p is not None,
    )


def state_of(choice: DeviceChoice, newest: int, position: int) -> list[int]:
    """The state of a sequence before a round, ``STATE`` numbers: what the kernels read."""
    numbers = choice.numbers
    floats = struct.pack(
        "ff", 0.0 if numbers is None else numbers.scale, 0.0 if numbers is None else numbers.min_p or 0.0
    )
    base = struct.unpack("q", struct.pack("Q", choice.key_base))[0]
    top_p, top_k = (0, 0) if numbers is None else (numbers.top_p or 0, numbers.top_k)
    return [newest, position, base, struct.unpack("q", floats)[0], top_p, top_k]


def accepted_by_chance(chosen: Tensor, drafts: Tensor, keys: Tensor, chance: float, vocab: int) -> Tensor:
    """Choices that accept each draft with a chance if those before it are accepted; what is not sound (-1) stays so.

    Args:
        chosen: Int64, (sequences, k + 1).
        drafts: Int64, (sequences, k).
        keys: The low halves of the noise's keys of these choices, (sequences, k + 1): they draw.
        chance: 0 to 1.
        vocab: Number of tokens.
    """
    own = chosen[:, : drafts.shape[1]]
    accepts = (keys[:, : drafts.shape[1]] < round(chance * 2**32)).long().cumprod(1) > 0
    others = torch.where(own == drafts, (drafts + 1) % vocab, own)
    drawn = torch.where(accepts & (own >= 0), drafts, others)
    return torch.cat([drawn, chosen[:, drafts.shape[1] :]], 1)


def noise_keys_by_definition(state: Tensor, positions: Tensor) -> Tensor:
    """``noise_keys`` in torch's operations."""
    base = state[:, 2].repeat_interleave(len(positions) // len(state))
    return torch.stack(keys_at(base, positions + 1), 1)


def noise_keys(state: Tensor, positions: Tensor) -> Tensor:
    """The noise's keys for what follows the tokens at some positions.

    Args:
        state: Of the round, (sequences, ``STATE``).
        positions: Int64, shape (rows,), contiguous: as many of each sequence, one sequence after the other.

    Returns:
        Int64, shape (rows, 2): the low and the high halves.
    """
    if not runs_kernels(state.device):
        return noise_keys_by_definition(state, positions)
    count = len(positions)
    keys = torch.empty(count, 2, device=state.device, dtype=torch.int64)
    _keys[(1,)](state, positions, keys, count, count // len(state), COUNT=triton.next_power_of_2(count), num_warps=1)
    return keys


def choose_by_definition(logits: Tensor, keys: Tensor, state: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """``choose`` in torch's operations."""
    if len(state) > 1:
        rows = len(logits) // len(state)
        parts = zip(logits.split(rows), keys.split(rows), state.split(1), strict=True)
        tokens, most = zip(*(choose_by_definition(*part, kind) for part in parts), strict=True)
        return torch.cat(tokens), torch.cat(most)
    state = state[0]
    largest = logits.amax(-1).float()
    if not kind.sampled:
        return logits.argmax(-1), largest
    floats = state.view(torch.float32)
    numbers = RuleNumbers(
        floats[_SCALE],
        (int(state[5]) if kind.kept else 0) if kind.sorted is None else kind.sorted,
        state[4] if kind.top_p else None,
        floats[_MIN_P] if kind.min_p else None,
        None,
    )
    return choose_by_numbers(_OPS, logits, numbers, (keys[:, :1], keys[:, 1:])), largest


def choose(logits: Tensor, keys: Tensor, state: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """A token for each row by the core's rule.

    Args:
        logits: Shape (rows, vocab), any float dtype: as many rows of each sequence, one sequence after the other.
        keys: Of the rows' positions, as ``noise_keys`` gives them: (rows, 2).
        state: Of the round, (sequences, ``STATE``).
        kind: Of its choices.

    Returns:
        The tokens, int64, and the largest number of each row, float32, NaN if it has one: both (rows,).
    """
    if kind.sorted is not None or not runs_kernels(logits.device):
        tokens, largest = choose_by_definition(logits, keys, state, kind)
        # Where a row is not sound, no token may come out as chosen: the drafter needs one that exists.
        return tokens.clamp(max=logits.shape[1] - 1), largest
    rows, vocab = logits.shape
    return _Parts(rows, vocab, logits.device, kind).chosen(
        (_best_part, _top_part), (logits, logits.stride(0)), keys, state
    )


class _Parts:
    """What programs find in parts of rows: the best score, whose it is, and the largest logit."""

    def __init__(self, rows: int, vocab: int, device: torch.device, kind: Kind) -> None:
        self._rows, self._vocab, self._kind = rows, vocab, kind
        self._count = -(-vocab // _BLOCK)
        self._parts = triton.next_power_of_2(self._count)
        self._largest = torch.empty(rows, self._count, device=device, dtype=torch.float32)
        self._tokens = torch.empty(rows, device=device, dtype=torch.int64)
        self._most = torch.empty(rows, device=device, dtype=torch.float32)

    def chosen(
        self, kernels: tuple[Any, Any], given: tuple[Any, ...], keys: Tensor, state: Tensor, **constants: int
    ) -> tuple[Tensor, Tensor]:
        """The token and the largest logit of each row; ``given``: where the kernels find the logits."""
        best, top = kernels
        if self._kind.kept:
            self._choose_among_best(top, given, keys, state, constants)
        else:
            self._choose(best, given, keys, state, constants)
        return self._tokens, self._most

    def _choose(
        self, chooses: Any, given: tuple[Any, ...], keys: Tensor, state: Tensor, constants: dict[str, int]
    ) -> None:
        scores = torch.empty_like(self._largest)
        ids = torch.empty_like(self._largest, dtype=torch.int64)
        for finds_largest in (True, False) if self._kind.min_p else (False,):
            chooses[(self._rows, self._count)](
                *(*given, keys, state, scores, ids, self._largest, self._vocab, self._count, self._rows // len(state)),
                BLOCK=_BLOCK,
                PARTS=self._parts,
                SAMPLED=self._kind.sampled and not finds_largest,
                MIN_P=self._kind.min_p and not finds_largest,
                **constants,
                **_EXACT,
            )
        _best[(self._rows,)](
            *(scores, ids, self._largest, self._tokens, self._most, self._count), PARTS=self._parts, num_warps=4
        )

    def _choose_among_best(
        self, narrows: Any, given: tuple[Any, ...], keys: Tensor, state: Tensor, constants: dict[str, int]
    ) -> None:
        kept = self._kind.kept
        narrowed = torch.empty(self._rows, self._count * kept, device=keys.device, dtype=torch.int64)
        narrows[(self._rows, self._count)](
            *(*given, state, narrowed, self._largest, self._vocab, self._count, self._rows // len(state)),
            BLOCK=_BLOCK,
            KEPT=kept,
            **constants,
            **_EXACT,
        )
        while narrowed.shape[1] > max(2 * kept, 512):
            size = narrowed.shape[1]
            parts = -(-size // _BLOCK)
            fewer = torch.empty(self._rows, parts * kept, device=keys.device, dtype=torch.int64)
            _narrow[(self._rows, parts)](narrowed, fewer, size, parts, BLOCK=_BLOCK, KEPT=kept, num_warps=4)
            narrowed = fewer
        _filter[(self._rows,)](
            *(narrowed, keys, state, self._largest, self._tokens, self._most),
            *(narrowed.shape[1], self._count, self._rows // len(state)),
            SIZE=triton.next_power_of_2(narrowed.shape[1]),
            KEPT=kept,
            PARTS=self._parts,
            TOP_P=self._kind.top_p,
            MIN_P=self._kind.min_p,
            **_EXACT,
        )


class ClusteredHead:
    """A head that gives logits of their own only to the tokens of the best clusters, all others one below the least.

    Args:
        embedder: ``Gemma4AssistantMaskedEmbedder``.
        weight: Of the head, (vocab, hidden_size).
    """

    def __init__(self, embedder: Any, weight: Tensor) -> None:
        self._centroids: Tensor = embedder.centroids.weight
        self._weight = weight
        self._clusters: int = embedder.num_centroids
        self._top: int = embedder.centroid_intermediate_top_k
        self._ordering: Tensor = embedder.token_ordering.long().view(self._clusters, -1)
        flat = self._ordering.view(-1)
        # Where each token stands in the ordering; only if each stands there once can columns be computed by token.
        self._places = torch.zeros_like(flat, dtype=torch.int32)
        self._places[flat] = torch.arange(len(flat), device=flat.device, dtype=torch.int32)
        in_order = torch.arange(len(flat), device=flat.device)
        self._is_fused = runs_kernels(weight.device) and (
            len(flat) == len(weight) and torch.equal(flat[self._places.long()], in_order)
        )

    def logits(self, row: Tensor) -> Tensor:
        """Logits (rows, vocab) of hidden rows (rows, hidden_size); computed without waiting for the device."""
        if row.shape[0] > 1:
            return torch.cat([self.logits(one) for one in row.split(1)])
        scores = functional.linear(row, self._centroids)
        best, top = scores.topk(self._top, dim=-1)
        # index_select copies whole rows, where indexing goes by element.
        ids = self._ordering.index_select(0, top[0]).view(-1)
        # Scores that are not finite, which topk puts first, make all logits NaN: any clusters could have been chosen.
        chosen = functional.linear(row, self._weight.index_select(0, ids)) + best[:, :1] * 0
        lowest = (chosen.amin(dim=-1, keepdim=True) - 1.0).expand(-1, self._weight.shape[0])
        return lowest.scatter(-1, ids[None], chosen)

    def choose(self, row: Tensor, keys: Tensor, state: Tensor, kind: Kind, vocab: int) -> tuple[Tensor, Tensor]:
        """``choose`` from these logits, as many columns of them as there are below ``vocab``."""
        if kind.sorted is not None or not self._is_fused:
            return choose(self.logits(row)[:, :vocab], keys, state, kind)
        size = self._ordering.shape[1]
        rows = len(row)
        scores = functional.linear(row, self._centroids)
        ranks = torch.empty(rows, self._clusters, device=row.device, dtype=torch.int32)
        top = torch.empty(rows, self._top, device=row.device, dtype=torch.int32)
        spoilt = torch.empty(rows, device=row.device, dtype=torch.float32)
        _rank[(-(-self._clusters // _RANKED), rows)](
            *(scores, ranks, top, spoilt, self._clusters, self._top),
            OWN=_RANKED,
            ALL=triton.next_power_of_2(self._clusters),
            num_warps=4,
        )
        chosen = torch.empty(rows, self._top, size, device=row.device, dtype=row.dtype)
        _cluster[(self._top, -(-size // _CLUSTER_ROWS), rows)](
            *(row, self._weight, self._ordering, top, spoilt, chosen, size, row.shape[1]),
            ROWS=_CLUSTER_ROWS,
            WIDTH=triton.next_power_of_2(row.shape[1]),
            num_warps=4,
        )
        vocab = min(vocab, len(self._weight))
        return _Parts(rows, vocab, row.device, kind).chosen(
            (_best_of_clusters, _top_of_clusters),
            (chosen, self._places, ranks, self._clusters, self._top, size),
            *(keys, state),
            CHOSEN=triton.next_power_of_2(self._top * size),
        )


_EXACT = {"num_warps": 4, "enable_fp_fusion": False}  # every product is rounded before it is added


def _keys_kernel(
    state, positions, keys, count, own_rows, COUNT: tl.constexpr
):  # fmt: skip
    index = tl.arange(0, COUNT)
    position = tl.load(positions + index, mask=index < count, other=0)
    base = tl.load(state + index // own_rows * _STATE + 2, mask=index < count, other=0)
    key = _mixed(_mixed(position + 1) ^ base)
    tl.store(keys + 2 * index, key & 0xFFFFFFFF, mask=index < count)
    tl.store(keys + 2 * index + 1, (key >> 32) & 0xFFFFFFFF, mask=index < count)


def _mixed(z):
    # SplitMix64, as ``polydraft.sampling.noise.keys_at``: constants as signed numbers, right shifts without the sign
    z = z - 7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _hashed(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


def _minus_log(value):
    """As ``polydraft.sampling.noise.log_positive``, with the sign turned."""
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = mantissa > _SQRT_2
    e = tl.where(large, exponent + 1, exponent).to(tl.float32)
    x = tl.where(large, mantissa * 0.5, mantissa) - 1.0
    square = x * x
    y = x * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for i in tl.static_range(2, 9):
        y = y * x + _POLYNOMIAL[i]
    y = y * x * square
    y = y + e * _LOG2_LOW
    y = y + square * -0.5
    return ((x + y) + e * _LOG2_HIGH) * -1.0


def _noise(column, row, keys):
    low, high = tl.load(keys + 2 * row).to(tl.uint32), tl.load(keys + 2 * row + 1).to(tl.uint32)
    bits = _hashed(_hashed(column.to(tl.uint32) ^ low) + high) >> 9
    uniform = (bits.to(tl.int32).to(tl.float32) * 2.0 + 1.0) * 5.9604644775390625e-08
    return _minus_log(_minus_log(uniform))


def _store_best(
    x, column, exists, row, part, parts, keys, state, scores, ids, largest,
    PARTS: tl.constexpr, SAMPLED: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """The best column of a part of a row; ``x``: its logits, float32, -inf where there are none."""
    nan = x != x
    x = tl.where(nan, float("-inf"), x)
    at = row * parts + part
    if not MIN_P:  # a part of the row reads the others' below
        most = tl.where(tl.max(nan.to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))
        tl.store(largest + at, most)
    score = x
    if SAMPLED:
        scale = tl.load(state + 3).to(tl.int32).to(tl.float32, bitcast=True)
        scaled = x * scale
        score = scaled + _noise(column, row, keys)
        if MIN_P:
            every = tl.arange(0, PARTS)
            of_row = tl.max(tl.load(largest + row * parts + every, mask=every < parts, other=float("-inf")), 0)
            least = of_row * scale + (tl.load(state + 3) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            score = tl.where(scaled >= least, score, float("-inf"))
        score = tl.where(exists, score, float("-inf"))
    best, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(scores + at, best)
    tl.store(ids + at, (part * x.shape[0] + index).to(tl.int64))


def _best_part_kernel(
    X, x_row, keys, state, scores, ids, largest, vocab, parts, own_rows,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, SAMPLED: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    exists = column < vocab
    x = tl.load(X + row * x_row + column, mask=exists, other=float("-inf")).to(tl.float32)
    state += row // own_rows * _STATE
    _store_best(x, column, exists, row, part, parts, keys, state, scores, ids, largest, PARTS, SAMPLED, MIN_P)


def _top_part_kernel(
    X, x_row, state, narrowed, largest, vocab, parts, own_rows, BLOCK: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    exists = column < vocab
    x = tl.load(X + row * x_row + column, mask=exists, other=float("-inf")).to(tl.float32)
    state += row // own_rows * _STATE
    _store_top(x, column, exists, row * parts + part, state, narrowed, largest, KEPT)


def _store_top(
    x, column, exists, at, state, narrowed, largest, KEPT: tl.constexpr
):  # fmt: skip
    """The best tokens of a part of a row, as numbers in the rule's order: the value's bits above those of the id."""
    nan = x != x
    x = tl.where(nan, float("-inf"), x)
    tl.store(largest + at, tl.where(tl.max(nan.to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0)))
    x = x * tl.load(state + 3).to(tl.int32).to(tl.float32, bitcast=True)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 would sort below 0.0
    ordered = tl.where(bits < 0, -2147483648 - (bits + 1), bits).to(tl.int64)
    order = (ordered << 21) + (0x1FFFFF - column)
    order = tl.where(exists, order, -0x4000000000000000)  # below all others
    tl.store(narrowed + at * KEPT + tl.arange(0, KEPT), tl.topk(order, KEPT))


def _narrow_kernel(
    every, fewer, size, parts, BLOCK: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    order = tl.load(every + row * size + index, mask=index < size, other=-0x4000000000000000)
    tl.store(fewer + (row * parts + part) * KEPT + tl.arange(0, KEPT), tl.topk(order, KEPT))


def _exp(x):
    """As ``polydraft.sampling.noise.exp_nonpositive``."""
    x = tl.where(x < -80.0, -80.0, x)
    whole = tl.floor(x * _LOG2_E + 0.5)
    x = x - whole * _LOG2_HIGH
    x = x - whole * _LOG2_LOW
    y = x * _EXP_POLYNOMIAL[0] + _EXP_POLYNOMIAL[1]
    for i in tl.static_range(2, 6):
        y = y * x + _EXP_POLYNOMIAL[i]
    y = y * (x * x) + x + 1.0
    return y * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


def _filter_kernel(
    narrowed, keys, state, largest, tokens, most, size, parts, own_rows,
    SIZE: tl.constexpr, KEPT: tl.constexpr, PARTS: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """The choice among a row's best tokens; ``_filter_sorted`` and what follows it in the rule."""
    row, index = tl.program_id(0), tl.arange(0, SIZE)
    state += row // own_rows * _STATE
    order = tl.load(narrowed + row * size + index, mask=index < size, other=-0x4000000000000000)
    order = tl.topk(order, KEPT)  # descending
    place = tl.arange(0, KEPT)
    exists = (order > -0x4000000000000000) & (place < tl.load(state + 5))
    column = (0x1FFFFF - (order & 0x1FFFFF)).to(tl.int32)
    ordered = (order >> 21).to(tl.int32)
    value = tl.where(ordered < 0, -2147483648 - (ordered + 1), ordered).to(tl.float32, bitcast=True)
    value = tl.where(exists, value, float("-inf"))
    of_row = tl.max(value, 0)
    value = tl.where(value >= of_row - _REACH, value, float("-inf"))
    left = exists
    if TOP_P:
        weight = tl.floor(_exp(value - of_row) * 16777216.0).to(tl.int64)
        weight = tl.where(exists, weight, 0)
        before = tl.cumsum(weight, 0) - weight
        left = left & (before * _SHARE_ONE < tl.sum(weight, 0) * tl.load(state + 4))
    if MIN_P:
        left = left & (value >= of_row + (tl.load(state + 3) >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    score = tl.where(left, value + _noise(column, row, keys), float("-inf"))
    winners = score == tl.max(score, 0)
    found = tl.min(tl.where(winners, column, 0x1FFFFF), 0)
    # Of a row that is not sound perhaps none: any token that exists will do.
    found = tl.where(found == 0x1FFFFF, tl.max(tl.where(place == 0, column, 0), 0), found)
    tl.store(tokens + row, found.to(tl.int64))
    _store_most(largest, most, row, parts, PARTS)


def _best_kernel(
    scores, ids, largest, tokens, most, parts, PARTS: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    exists = part < parts
    score = tl.load(scores + row * parts + part, mask=exists, other=float("-inf"))
    _, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens + row, tl.load(ids + row * parts + index))
    _store_most(largest, most, row, parts, PARTS)


def _store_most(
    largest, most, row, parts, PARTS: tl.constexpr
):  # fmt: skip
    part = tl.arange(0, PARTS)
    x = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    nan = x != x
    found = tl.max(tl.where(nan, float("-inf"), x), 0)
    tl.store(most + row, tl.where(tl.max(nan.to(tl.int32), 0) > 0, float("nan"), found))


def _rank_kernel(
    scores, ranks, top, spoilt, clusters, count, OWN: tl.constexpr, ALL: tl.constexpr
):  # fmt: skip
    row, own, every = tl.program_id(1), tl.program_id(0) * OWN + tl.arange(0, OWN), tl.arange(0, ALL)
    scores += row * clusters
    ranks += row * clusters
    top += row * count
    all_scores = tl.load(scores + every, mask=every < clusters, other=float("-inf")).to(tl.float32)
    # NaN compares with nothing: it gets a place in the order, so that the chosen clusters always exist and differ.
    order = tl.where(all_scores > float("-inf"), all_scores, float("-inf"))
    own_order = tl.load(scores + own, mask=own < clusters, other=float("-inf")).to(tl.float32)
    own_order = tl.where(own_order > float("-inf"), own_order, float("-inf"))
    earlier = (order[None, :] == own_order[:, None]) & (every[None, :] < own[:, None])
    rank = tl.sum(((order[None, :] > own_order[:, None]) | earlier).to(tl.int32), 1)
    tl.store(ranks + own, rank, mask=own < clusters)
    tl.store(top + rank, own, mask=(own < clusters) & (rank < count))
    if tl.program_id(0) == 0:
        nan = (all_scores != all_scores) & (every < clusters)
        # 0, or NaN where the largest score is not finite
        tl.store(spoilt + row, tl.where(tl.max(nan.to(tl.int32), 0) > 0, float("nan"), tl.max(order, 0) * 0.0))


def _cluster_kernel(
    X, W, ordering, top, spoilt, chosen, size, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    row, at = tl.program_id(2), tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    token = tl.load(ordering + tl.load(top + at).to(tl.int64) * size + place, mask=place < size, other=0)
    x = tl.load(X + row * width + k, mask=k < width, other=0.0).to(tl.float32)
    w = tl.load(W + token[:, None] * width + k[None, :], mask=(place[:, None] < size) & (k[None, :] < width), other=0.0)
    logit = tl.sum(w.to(tl.float32) * x[None, :], 1) + tl.load(spoilt + row)
    tl.store(chosen + at * size + place, logit.to(chosen.dtype.element_ty), mask=place < size)


def _of_clusters(
    chosen, places, ranks, column, exists, top, size, CHOSEN: tl.constexpr
):  # fmt: skip
    """Logits of some columns: float32, -inf where there is none."""
    every = tl.arange(0, CHOSEN)
    lowest = tl.min(tl.load(chosen + every, mask=every < top * size, other=float("inf")).to(tl.float32), 0) - 1.0
    lowest = lowest.to(chosen.dtype.element_ty).to(tl.float32)
    place = tl.load(places + column, mask=exists, other=0)
    rank = tl.load(ranks + place // size)
    own = exists & (rank < top)
    x = tl.load(chosen + rank * size + place % size, mask=own, other=0.0).to(tl.float32)
    return tl.where(own, x, tl.where(exists, lowest, float("-inf")))


def _best_of_clusters_kernel(
    chosen, places, ranks, clusters, top, size, keys, state, scores, ids, largest, vocab, parts, own_rows,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, CHOSEN: tl.constexpr, SAMPLED: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    exists = column < vocab
    x = _of_clusters(chosen + row * top * size, places, ranks + row * clusters, column, exists, top, size, CHOSEN)
    state += row // own_rows * _STATE
    _store_best(x, column, exists, row, part, parts, keys, state, scores, ids, largest, PARTS, SAMPLED, MIN_P)


def _top_of_clusters_kernel(
    chosen, places, ranks, clusters, top, size, state, narrowed, largest, vocab, parts, own_rows,
    BLOCK: tl.constexpr, CHOSEN: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    exists = column < vocab
    x = _of_clusters(chosen + row * top * size, places, ranks + row * clusters, column, exists, top, size, CHOSEN)
    state += row // own_rows * _STATE
    _store_top(x, column, exists, row * parts + part, state, narrowed, largest, KEPT)


if triton is not None:
    _POLYNOMIAL, _LOG2_HIGH, _LOG2_LOW, _SQRT_2 = (
        tl.constexpr(LOG_CONSTANTS[name]) for name in ("POLYNOMIAL", "LOG2_HIGH", "LOG2_LOW", "SQRT_2")
    )
    _EXP_POLYNOMIAL, _LOG2_E = tl.constexpr(EXP_CONSTANTS["POLYNOMIAL"]), tl.constexpr(EXP_CONSTANTS["LOG2_E"])
    _STATE = tl.constexpr(STATE)
    _REACH, _SHARE_ONE = tl.constexpr(as_float32(REACH)), tl.constexpr(SHARE_ONE)
    _mixed, _hashed, _minus_log, _noise, _exp, _store_best, _store_top, _store_most, _of_clusters = (
        triton.jit(function)
        for function in (
            *(_mixed, _hashed, _minus_log, _noise, _exp),
            *(_store_best, _store_top, _store_most, _of_clusters),
        )
    )
    _keys, _best_part, _top_part, _narrow, _filter, _best, _rank, _cluster, _best_of_clusters, _top_of_clusters = (
        kernel(function, do_not_specialize=("own_rows", "count"))
        for function in (
            *(_keys_kernel, _best_part_kernel, _top_part_kernel, _narrow_kernel, _filter_kernel, _best_kernel),
            *(_rank_kernel, _cluster_kernel, _best_of_clusters_kernel, _top_of_clusters_kernel),
        )
    )
