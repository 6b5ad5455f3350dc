"""The array operations that choosing a token needs, so that one rule works in numpy, torch and MLX.

An implementation maps each name to its library's own function. Each operation is elementwise, exact on integers, or
independent of order, and none fuses a multiply with an add: so the same logits give the same token ids everywhere.

``polydraft.sampling.noise`` and ``polydraft.sampling.rule`` define what is computed with them;
``polydraft.sampling.numpy_ops`` is a complete example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["ArrayOps", "Indices"]

A = TypeVar("A")

Indices: TypeAlias = "Sequence[int] | npt.NDArray[np.int64]"
"""Row or column numbers of ``ArrayOps.entries``."""


class ArrayOps(Protocol[A]):
    """Operations on the arrays of one library.

    ``A`` also has ``shape`` and the operators + - * & | ^ << >> < <= > >= ==, with another array or a Python number
    on the right, and - with a number on the left.

    Shapes: ``rows`` is the number of positions chosen at once, ``n`` the number of candidates per row.
    """

    def float32(self, array: Any) -> A:
        """``array`` as float32 (a copy only where needed), shape kept."""

    def int64(self, array: A) -> A:
        """``array`` (int32, or float32 holding whole numbers) as int64."""

    def bits(self, array: A) -> A:
        """The IEEE bits of a float32 array, as int64 (sign-extended from int32)."""

    def from_bits(self, array: A) -> A:
        """Float32 array of the IEEE bits in an int64 array whose values fit into int32."""

    def column(self, values: Sequence[int], like: A) -> A:
        """Int64 array of shape (len(values), 1), on the device of ``like``."""

    def where(self, condition: A, yes: A | float, no: A | float) -> A:
        """Elementwise choice; the result has the dtype of the array among ``yes`` and ``no``."""

    def floor(self, array: A) -> A:
        """Elementwise floor, float32."""

    def host_view(self, array: Any) -> npt.NDArray[np.float32] | None:
        """The values as a float32 numpy array if they are in host memory: a view where possible, never written to.

        None if they are on a device: tokens are then chosen there, with one synchronisation at the end.
        """

    def noise_bits(self, token_ids: A, low: A, high: A) -> A:
        """The hash that the noise is made from.

        ``polydraft.sampling.noise.generic_noise_bits`` defines it; call that unless the library has a faster way.

        Args:
            token_ids: Int64, shape (rows, n).
            low: Int64, shape (rows, 1): the first list of ``polydraft.sampling.noise.row_keys``.
            high: Int64, shape (rows, 1): the second list.

        Returns:
            Integers from 0 to 2**23 - 1, of any integer dtype, shape (rows, n).
        """

    def gumbel(self, token_ids: A, low: A, high: A) -> A:
        """Noise for each token id.

        ``polydraft.sampling.noise.gumbel`` defines it, bit by bit; call that unless the library has a faster way, such
        as one fused kernel in place of a hundred small ones. The arguments are those of ``noise_bits``.

        Returns:
            Float32, shape (rows, n).
        """

    def row_max(self, array: A) -> A:
        """Maximum over the last axis, shape (rows, 1)."""

    def row_min(self, array: A) -> A:
        """Minimum over the last axis, shape (rows, 1)."""

    def row_sum(self, array: A) -> A:
        """Int64 sum over the last axis, shape (rows, 1)."""

    def row_cumsum(self, array: A) -> A:
        """Inclusive int64 cumulative sum over the last axis, shape (rows, n)."""

    def argmax(self, array: A) -> A:
        """Index of the first maximum over the last axis: int64, shape (rows,)."""

    def argsort_descending(self, keys: A) -> A:
        """Int64 indices that sort each row of int64 ``keys`` in descending order; only padding has equal keys."""

    def take(self, array: A, indices: A) -> A:
        """``array[row, indices[row, i]]``, shape of ``indices``."""

    def candidates(self, values: A, floor: A) -> tuple[A, A]:
        """The entries of each row of at least ``floor`` (rows, 1), with their column indices.

        Returns:
            Float32 values of shape (rows, n), ``-inf`` where they are below the floor or padding, and int64 column
            indices of shape (rows, n). A library may return all columns (n = vocab) where compacting costs more
            than it saves, as on a GPU.
        """

    def best(self, array: A, count: int) -> tuple[A, A]:
        """The ``count`` largest values of each row, descending, and their int64 column indices: both (rows, count)."""

    def first_column(self, array: A) -> A:
        """``array[:, 0]``."""

    def columns(self, array: A) -> A:
        """Column indices 0 to n - 1 in each row: int64, shape of ``array`` (rows, n). Need not be contiguous."""

    def entries(self, array: A, rows: Indices, columns: Indices) -> A:
        """``array[rows[i], columns[i]]``: shape (len(rows),). Indices are sequences or int64 numpy arrays."""

    def with_entries(self, array: A, rows: Indices, columns: Indices, values: A | float) -> A:
        """A copy of ``array`` with ``[rows[i], columns[i]]`` replaced by ``values[i]``, or by one number."""

    def tolist(self, array: A) -> list[Any]:
        """The array's values as (nested) lists on the host. Waits for the device."""

    def numpy(self, array: Any) -> Any:
        """Copy to the host as a numpy array: float32 for any float dtype, else int64. Waits for the device."""

    def from_numpy(self, array: Any, like: Any) -> A:
        """A numpy array (float32 or int64) as the library's own, on the device of ``like``."""
