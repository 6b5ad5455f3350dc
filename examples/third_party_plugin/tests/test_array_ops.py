"""A third party's arrays: tokens are chosen where the logits are, with polydraft's public names alone.

``DeviceArray`` stands for the array of a library that polydraft does not know. It has the operators, and nothing else
of numpy; to copy one to the host is counted, as on a device it means to wait.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partialmethod
from typing import Any

import numpy as np
import polydraft
import pytest
from polydraft.contract import ArrayOps, GenerationSettings, Indices, Sampler, Step
from polydraft.sampling import noise
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import choose_tokens
from polydraft_markov import plugin, stepping
from polydraft_markov.stepping import MarkovSequence

HOST = NumpyOps()


class DeviceArray:
    """An array of another library; here numpy keeps its numbers."""

    copies_to_host = 0

    def __init__(self, values: Any) -> None:
        self._values = values
        self.shape = values.shape

    def __getitem__(self, rows: slice) -> DeviceArray:
        return DeviceArray(self._values[rows])

    def __int__(self) -> int:
        return int(self.to_host())

    def to_host(self) -> Any:
        DeviceArray.copies_to_host += 1
        return self._values


def on_device(function: Callable[..., Any], *arguments: Any) -> DeviceArray:
    """Stands for a kernel of the library."""
    return DeviceArray(function(*(a._values if isinstance(a, DeviceArray) else a for a in arguments)))


for name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq"):
    compute = getattr(operator, f"__{name}__")
    setattr(DeviceArray, f"__{name}__", partialmethod(lambda x, y, compute: on_device(compute, x, y), compute=compute))
DeviceArray.__rsub__ = lambda self, other: on_device(operator.sub, other, self)  # type: ignore[attr-defined]


class DeviceOps(ArrayOps[DeviceArray]):
    """Each operation is one of the library's own. Deriving from the protocol lets a type checker compare them."""

    def float32(self, array: Any) -> DeviceArray:
        return on_device(HOST.float32, array)

    def int64(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.int64, array)

    def bits(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.bits, array)

    def from_bits(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.from_bits, array)

    def column(self, values: Sequence[int], like: DeviceArray) -> DeviceArray:
        return DeviceArray(np.array(values, dtype=np.int64)[:, None])

    def where(self, condition: DeviceArray, yes: DeviceArray | float, no: DeviceArray | float) -> DeviceArray:
        return on_device(HOST.where, condition, yes, no)

    def floor(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.floor, array)

    def host_view(self, array: Any) -> None:
        """Nothing lies in host memory: the choice is made on the device."""

    def noise_bits(self, token_ids: DeviceArray, low: DeviceArray, high: DeviceArray) -> DeviceArray:
        bits: DeviceArray = noise.generic_noise_bits(self, token_ids, low, high)
        return bits

    def gumbel(self, token_ids: DeviceArray, low: DeviceArray, high: DeviceArray) -> DeviceArray:
        values: DeviceArray = noise.gumbel(self, token_ids, (low, high))
        return values

    def row_max(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.row_max, array)

    def row_min(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.row_min, array)

    def row_sum(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.row_sum, array)

    def row_cumsum(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.row_cumsum, array)

    def argmax(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.argmax, array)

    def argsort_descending(self, keys: DeviceArray) -> DeviceArray:
        return on_device(HOST.argsort_descending, keys)

    def take(self, array: DeviceArray, indices: DeviceArray) -> DeviceArray:
        return on_device(HOST.take, array, indices)

    def candidates(self, values: DeviceArray, floor: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
        # All columns: to compact them means to wait for the device.
        return on_device(lambda v, f: np.where(v >= f, v, -np.inf), values, floor), self.columns(values)

    def best(self, array: DeviceArray, count: int) -> tuple[DeviceArray, DeviceArray]:
        values, columns = HOST.best(array._values, count)
        return DeviceArray(values), DeviceArray(columns)

    def first_column(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.first_column, array)

    def columns(self, array: DeviceArray) -> DeviceArray:
        return on_device(HOST.columns, array)

    def entries(self, array: DeviceArray, rows: Indices, columns: Indices) -> DeviceArray:
        return on_device(HOST.entries, array, rows, columns)

    def with_entries(
        self, array: DeviceArray, rows: Indices, columns: Indices, values: DeviceArray | float
    ) -> DeviceArray:
        return on_device(HOST.with_entries, array, rows, columns, values)

    def tolist(self, array: DeviceArray) -> list[Any]:
        return HOST.tolist(array.to_host())

    def numpy(self, array: Any) -> Any:
        return HOST.numpy(array.to_host())

    def from_numpy(self, array: Any, like: Any) -> DeviceArray:
        return DeviceArray(array)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_a_devices_choices_are_numpys(given: dict[str, Any]) -> None:
    settings = GenerationSettings(**given)
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=(5, 2000), scale=3).astype(np.float32)
        wanted = choose_tokens(HOST, logits, settings, seed, 0, 17)
        DeviceArray.copies_to_host = 0
        found = choose_tokens(DeviceOps(), DeviceArray(logits), settings, seed, 0, 17)
        assert DeviceArray.copies_to_host == 0
        assert found.to_host().tolist() == wanted.tolist()


class Upload:
    """A sampler that is given logits on the device, as a model that computes there would give them."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.needs_prefix = sampler.needs_prefix

    def choose(self, logits: Any, *arguments: Any, **options: Any) -> Any:
        return self.sampler.choose(DeviceArray(logits), *arguments, **options)

    def choose_draft(self, logits: Any, *arguments: Any) -> Any:
        return self.sampler.choose_draft(DeviceArray(logits), *arguments)


class DeviceSequence(MarkovSequence):
    """The example's sequence, as if its model computed on the device."""

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        return super().prefill(token_ids, Upload(sampler), keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        return super().verify(token_ids, Upload(sampler), keep_logits=keep_logits)


@pytest.mark.parametrize("given", [*SETTINGS, {"temperature": 0.7, "repetition_penalty": 1.2, "logprobs": 3}], ids=str)
def test_an_engine_with_such_arrays_writes_the_same(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    host = polydraft.PluginHost({"markov": plugin})

    def written() -> polydraft.GenerationResult:
        with polydraft.load("builtin:markov", backend="markov", host=host) as session:
            return session.generate("Q: What is a drafter?", max_new_tokens=40, seed=1, **given)

    wanted = written()
    monkeypatch.setattr(stepping, "MarkovSequence", DeviceSequence)
    monkeypatch.setattr(stepping.MarkovEngine, "array_ops", DeviceOps())
    found = written()
    assert found.token_ids == wanted.token_ids
    assert found.logprobs == wanted.logprobs
    assert found.stats.num_accepted_tokens == wanted.stats.num_accepted_tokens
    assert found.stats.num_accepted_tokens
