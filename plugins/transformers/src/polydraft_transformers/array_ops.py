"""The sampler's array operations on torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from polydraft.contract import Indices
from polydraft.sampling.noise import gumbel

from polydraft_transformers.fused_noise import fused_gumbel

__all__ = ["TorchOps", "separate_gumbel"]


class TorchOps:
    """``polydraft.contract.ArrayOps`` on torch tensors; nothing waits for a device but ``tolist`` and ``numpy``."""

    def float32(self, array: Any) -> torch.Tensor:
        return torch.as_tensor(array).to(torch.float32)

    def int64(self, array: torch.Tensor) -> torch.Tensor:
        return array.to(torch.int64)

    def bits(self, array: torch.Tensor) -> torch.Tensor:
        return array.contiguous().view(torch.int32).to(torch.int64)

    def from_bits(self, array: torch.Tensor) -> torch.Tensor:
        return array.to(torch.int32).view(torch.float32)

    def column(self, values: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        return _moved(torch.tensor(values, dtype=torch.int64), like.device)[:, None]

    def where(self, condition: torch.Tensor, yes: Any, no: Any) -> torch.Tensor:
        return torch.where(condition, yes, no)

    def floor(self, array: torch.Tensor) -> torch.Tensor:
        return torch.floor(array)

    def host_view(self, array: torch.Tensor) -> Any:
        if array.device.type != "cpu":
            return None
        return array.detach().numpy() if array.dtype == torch.float32 else array.detach().float().numpy()

    def noise_bits(self, token_ids: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        # Int32 wraps as uint32 does; only its right shifts must lose the sign.
        values = _lowbias32(token_ids.to(torch.int32) ^ low.to(torch.int32))
        return (_lowbias32(values + high.to(torch.int32)) >> 9) & 0x7FFFFF

    def gumbel(self, token_ids: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        if token_ids.is_cuda and (fused := fused_gumbel(token_ids.device, separate_gumbel)) is not None:
            return fused(token_ids, low, high)
        return separate_gumbel(token_ids, low, high)

    def row_max(self, array: torch.Tensor) -> torch.Tensor:
        return array.amax(dim=-1, keepdim=True)

    def row_min(self, array: torch.Tensor) -> torch.Tensor:
        return array.amin(dim=-1, keepdim=True)

    def row_sum(self, array: torch.Tensor) -> torch.Tensor:
        return array.sum(dim=-1, keepdim=True)

    def row_cumsum(self, array: torch.Tensor) -> torch.Tensor:
        return array.cumsum(dim=-1)

    def argmax(self, array: torch.Tensor) -> torch.Tensor:
        # The documentation promises the first of several maximal values.
        return array.argmax(dim=-1)

    def argsort_descending(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.argsort(dim=-1, descending=True)

    def take(self, array: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return array.gather(-1, indices)

    def candidates(self, values: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Nothing is compacted: on a device that would mean to wait for it, and on a host numpy does the choosing.
        columns = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
        return torch.where(values >= floor, values, -torch.inf), columns

    def best(self, array: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = array.topk(min(count, array.shape[-1]), dim=-1)
        return found.values, found.indices

    def first_column(self, array: torch.Tensor) -> torch.Tensor:
        return array[:, 0]

    def columns(self, array: torch.Tensor) -> torch.Tensor:
        return torch.arange(array.shape[-1], device=array.device).expand(array.shape)

    def entries(self, array: torch.Tensor, rows: Indices, columns: Indices) -> torch.Tensor:
        return array[self._index(rows, array), self._index(columns, array)]

    def with_entries(
        self, array: torch.Tensor, rows: Indices, columns: Indices, values: torch.Tensor | float
    ) -> torch.Tensor:
        changed = array.clone()
        changed[self._index(rows, array), self._index(columns, array)] = values
        return changed

    def tolist(self, array: torch.Tensor) -> list[Any]:
        result: list[Any] = array.tolist()
        return result

    def numpy(self, array: torch.Tensor) -> Any:
        wanted = torch.float32 if array.is_floating_point() else torch.int64
        return array.detach().to(device="cpu", dtype=wanted).numpy().copy()

    def from_numpy(self, array: Any, like: torch.Tensor) -> torch.Tensor:
        return _moved(torch.from_numpy(array), like.device)

    @staticmethod
    def _index(values: Indices, like: torch.Tensor) -> torch.Tensor:
        return _moved(torch.as_tensor(values, dtype=torch.int64), like.device)


def separate_gumbel(token_ids: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The noise as the core defines it, in a hundred operations."""
    noise: torch.Tensor = gumbel(TorchOps(), token_ids, (low, high))
    return noise


def _moved(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it: a copy from memory that is not pinned waits for all work before it."""
    return array.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else array.to(device)


def _lowbias32(values: torch.Tensor) -> torch.Tensor:
    """The hash of ``polydraft.sampling.noise``, on int32."""
    values = values ^ ((values >> 16) & 0xFFFF)
    values = values * 0x7FEB352D
    values = values ^ ((values >> 15) & 0x1FFFF)
    # The same constant as a signed int32.
    values = values * (0x846CA68B - (1 << 32))
    return values ^ ((values >> 16) & 0xFFFF)
