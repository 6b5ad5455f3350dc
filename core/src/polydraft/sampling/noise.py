"""Gumbel noise from an integer hash, and the logarithm and exponential it needs, equal in every array library.

Noise at (seed, stream, position, token id) is a pure function of these four integers: framework generators depend on
shape and device. The map from the hash to a float is fixed here, bit by bit: only integer operations and separately
rounded IEEE float32 additions and multiplications are used, never a library's own ``log``.

Sources: the finaliser is ``lowbias32`` (Wellons, "Prospecting for Hash Functions", 2018); the keys are made by
SplitMix64 (Steele, Lea and Flood 2014); the polynomials of ``log`` and ``exp`` are those of Cephes (Moshier 1989).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps

__all__ = [
    "EXP_CONSTANTS",
    "LOG_CONSTANTS",
    "NOISE_MAX",
    "NOISE_MIN",
    "exp_nonpositive",
    "generic_noise_bits",
    "gumbel",
    "gumbel_of_bits",
    "key_base",
    "keys_at",
    "log_positive",
    "row_keys",
]

NOISE_MIN = -2.8116
"""Lower bound of the noise: -log(24 log 2), for the smallest u, 2**-24."""

NOISE_MAX = 16.6356
"""Upper bound of the noise: 24 log 2, for the largest u, 1 - 2**-24."""

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
# 2**64 divided by the golden ratio: the increment of SplitMix64.
_GOLDEN = 0x9E3779B97F4A7C15

_LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# log(2) in two parts; the first has few bits, so that its product with a small whole number is exact.
_LOG2_HIGH = 0.693359375
_LOG2_LOW = -2.12194440e-4
_LOG2_E = 1.44269504088896341
_SQRT_2 = 1.41421356237309505


LOG_CONSTANTS: dict[str, float | tuple[float, ...]] = {
    "POLYNOMIAL": _LOG_POLYNOMIAL,
    "LOG2_HIGH": _LOG2_HIGH,
    "LOG2_LOW": _LOG2_LOW,
    "SQRT_2": _SQRT_2,
}
"""The constants of ``log_positive``, for kernels that reimplement it."""

EXP_CONSTANTS: dict[str, float | tuple[float, ...]] = {
    "POLYNOMIAL": _EXP_POLYNOMIAL,
    "LOG2_HIGH": _LOG2_HIGH,
    "LOG2_LOW": _LOG2_LOW,
    "LOG2_E": _LOG2_E,
}
"""Those of ``exp_nonpositive``."""


def _splitmix64(state: int) -> int:
    z = (state + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def row_keys(seed: int, stream: int, positions: range) -> tuple[list[int], list[int]]:
    """Two 32-bit keys for each position.

    Args:
        seed: 0 to 2**63 - 1.
        stream: Number of the noise stream, from 0.
        positions: Absolute positions of the tokens to be chosen.

    Returns:
        The low and the high halves of one 64-bit key per position.
    """
    base = key_base(seed, stream)
    keys = [_splitmix64(base ^ _splitmix64(position)) for position in positions]
    return [key & _MASK32 for key in keys], [key >> 32 for key in keys]


def key_base(seed: int, stream: int) -> int:
    """What the keys of all positions are made from: 64 bits, unsigned."""
    # Hashed between the steps, so that seed 1 with stream 2 and seed 2 with stream 1 have different keys.
    return _splitmix64(_splitmix64(seed) ^ stream)


def keys_at(base: Any, positions: Any) -> tuple[Any, Any]:
    """``row_keys`` in operations on int64 arrays, for positions that only a device knows.

    Args:
        base: ``key_base``, as int64 (2**64 less from 2**63 on): an array of the shape of ``positions``, or ().
        positions: Int64 array of any shape.

    Returns:
        The low and the high halves, int64 arrays of the shape of ``positions``.
    """

    def mixed(z: Any) -> Any:
        # Products and sums wrap around; right shifts must lose the sign.
        z = z + _signed(_GOLDEN)
        z = (z ^ ((z >> 30) & (_MASK64 >> 30))) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ ((z >> 27) & (_MASK64 >> 27))) * _signed(0x94D049BB133111EB)
        return z ^ ((z >> 31) & (_MASK64 >> 31))

    keys = mixed(mixed(positions) ^ base)
    return keys & _MASK32, (keys >> 32) & _MASK32


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _lowbias32(values: Any) -> Any:
    values = values ^ (values >> 16)
    values = (values * 0x7FEB352D) & _MASK32
    values = values ^ (values >> 15)
    # The product may exceed 2**63: int64 wraps around, and its low 32 bits stay right.
    values = (values * 0x846CA68B) & _MASK32
    return values ^ (values >> 16)


def generic_noise_bits(ops: ArrayOps[Any], token_ids: Any, low: Any, high: Any) -> Any:
    """The hash that ``ArrayOps.noise_bits`` must equal, in int64 operations that every library has.

    Args:
        ops: The library's operations.
        token_ids: Int64, shape (rows, n).
        low: Int64, shape (rows, 1): the first list of ``row_keys``.
        high: Int64, shape (rows, 1): the second list.

    Returns:
        Int64 from 0 to 2**23 - 1, shape (rows, n).
    """
    return _lowbias32((_lowbias32(token_ids ^ low) + high) & _MASK32) >> 9


def gumbel(ops: ArrayOps[Any], token_ids: Any, keys: tuple[Any, Any]) -> Any:
    """Standard Gumbel noise for each token id, in separate operations: ``ArrayOps.gumbel`` must equal it bit by bit.

    ``u = (2 * bits + 1) / 2**24`` is never 0 or 1; the noise is ``-log(-log(u))``, between ``NOISE_MIN`` and
    ``NOISE_MAX``.

    Args:
        ops: The library's operations.
        token_ids: Int64 array of shape (rows, n).
        keys: The two int64 arrays (rows, 1) of ``row_keys``.

    Returns:
        Float32 array of shape (rows, n).
    """
    return gumbel_of_bits(ops, ops.noise_bits(token_ids, *keys))


def gumbel_of_bits(ops: ArrayOps[Any], bits: Any) -> Any:
    """The noise (float32, same shape) of hash values from 0 to 2**23 - 1."""
    # Odd multiples of 2**-24: exact in float32, and never 0 or 1, so that both logarithms are finite.
    uniform = (ops.float32(bits) * 2.0 + 1.0) * 2.0**-24
    # ``* -1.0``: unary minus is not among the operators that arrays must have.
    return log_positive(ops, log_positive(ops, uniform) * -1.0) * -1.0


def log_positive(ops: ArrayOps[Any], values: Any) -> Any:
    """Natural logarithm of normal positive float32 numbers, to about 1 ulp, with equal bits in every library."""
    # values = mantissa * 2**exponent with mantissa in (sqrt(1/2), sqrt(2)], then Cephes' polynomial of mantissa - 1
    bits = ops.bits(values)
    exponent = (bits >> 23) - 127
    # With the exponent bits of 1.0 it is a number from 1 to 2.
    mantissa = ops.from_bits((bits & 0x7FFFFF) | 0x3F800000)
    # Halved above sqrt(2): x then lies between -0.3 and 0.42, where the polynomial is accurate.
    large = mantissa > _SQRT_2
    exponent = ops.float32(ops.where(large, exponent + 1, exponent))
    x = ops.where(large, mantissa * 0.5, mantissa) - 1.0
    square = x * x
    y = x * _LOG_POLYNOMIAL[0] + _LOG_POLYNOMIAL[1]
    for coefficient in _LOG_POLYNOMIAL[2:]:
        y = y * x + coefficient
    # log(1 + x) = x - x**2 / 2 + x**3 * polynomial(x); the smallest terms are added first.
    y = y * x * square
    y = y + exponent * _LOG2_LOW
    y = y + square * -0.5
    return (x + y) + exponent * _LOG2_HIGH


def exp_nonpositive(ops: ArrayOps[Any], values: Any) -> Any:
    """Exponential of float32 numbers from -infinity to 0, to about 1 ulp; below -80 it is ``exp(-80)``."""
    # values = whole * log(2) + x; Cephes' polynomial gives exp(x), the exponent bits 2**whole
    # exp(-80) is a normal number; below about -87 there would be no exponent bits left for it.
    x = ops.where(values < -80.0, -80.0, values)
    whole = ops.floor(x * _LOG2_E + 0.5)
    # In two steps, with an exact first product: the remainder keeps its low bits (Cody and Waite).
    x = x - whole * _LOG2_HIGH
    x = x - whole * _LOG2_LOW
    y = x * _EXP_POLYNOMIAL[0] + _EXP_POLYNOMIAL[1]
    for coefficient in _EXP_POLYNOMIAL[2:]:
        y = y * x + coefficient
    y = y * (x * x) + x + 1.0
    return y * ops.from_bits((ops.int64(whole) + 127) << 23)
