"""Where the tests of kernels run: on a GPU, or without one in Triton's interpreter, which runs them over numpy.

``TRITON_INTERPRET=1`` selects the interpreter. It shows whether indices, masks and edges are right, and more than a
GPU: each address is checked, and memory that nobody has written holds NaN. Products and roundings are not a GPU's.
"""

import contextlib
import dataclasses
import os
import random
from types import SimpleNamespace

import pytest


@pytest.fixture
def device(monkeypatch):
    """The device of the kernels; skips the test where they cannot run."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        yield "cuda"
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or Triton and TRITON_INTERPRET=1")
    pytest.importorskip("triton", reason="Triton is not installed")
    np = pytest.importorskip("numpy")
    from polydraft_transformers import step_products

    monkeypatch.setattr(step_products, "_DEVICE", "cpu")
    _check_addresses(monkeypatch)
    torch.use_deterministic_algorithms(True)  # fills new memory
    with _mended_interpreter(monkeypatch), np.errstate(all="ignore"):
        yield "cpu"
    torch.use_deterministic_algorithms(False)


class Lots(random.Random):
    def between(self, *edges):
        """An edge, or any number between the least and the largest."""
        return self.choice(edges) if self.random() < 0.6 else self.randint(min(edges), max(edges))


@pytest.fixture
def lots(request):
    """What a test draws from, by its parameter; so do torch's random numbers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(request.param)
    return Lots(request.param)


@contextlib.contextmanager
def _mended_interpreter(monkeypatch):
    """Give Triton 3.7's interpreter bfloat16, which it multiplies as integers and rounds towards 0, and speed."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def widened(source):
        if source.dtype.scalar == tl.bfloat16:
            return (source.data.astype(np.uint32) << 16).view(np.float32)
        return source.data

    def rounded(self, source, dtype):
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            data = np.ascontiguousarray(source.data, np.float32)
            bits = data.view(np.uint32)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return handle(np.where(np.isnan(data), 0x7FC0, bits).astype(np.uint16), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and dtype.scalar != tl.bfloat16:
            source = handle(widened(source), tl.float32)
        return cast(self, source, dtype)

    def multiplied(self, a, b, added, *_):
        # In float64, so that a row's bits do not depend on where numpy finds it.
        product = np.matmul(*(widened(given).astype(np.float64) for given in (a, b))) + added.data
        return handle(product.astype(added.data.dtype), added.dtype.scalar)

    def reduced(self, given):
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce(self, given)
        (given,) = given
        data = np.bitwise_xor.reduce(given.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, given.dtype)]

    reduce = interpreter.ReduceOps.generic_reduce
    monkeypatch.setattr(builder, "cast_impl", rounded)
    monkeypatch.setattr(builder, "create_dot", multiplied)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduced)  # element by element; what `topk` uses
    # Once instead of in each call of a function, and without sums that only a debugging build looks at.
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    monkeypatch.setattr(interpreter, "_patch_lang", lambda _: SimpleNamespace(restore=lambda: None))
    quick = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)
    yield
    scope.restore()


@pytest.fixture
def small(device):
    """Whether a test is for the interpreter: shapes of few programs, which take a millisecond each."""
    return device == "cpu"


def _check_addresses(monkeypatch):
    """Fail where a kernel reads or writes outside the tensors whose addresses somebody has asked for."""
    import numpy as np
    import torch
    from triton.runtime import interpreter

    kept = {}  # tensors by where they lie, so that no other one gets their memory
    ranges = np.empty((2, 0), np.uint64)

    def asked(tensor):
        address = found(tensor)
        if tensor.numel():
            size = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            kept[address, size * tensor.itemsize] = tensor
        return address

    def checked(addresses, mask, itemsize):
        nonlocal ranges
        if ranges.shape[1] != len(kept):
            starts, sizes = np.array(sorted(kept), np.uint64).T
            ranges = np.stack([starts, np.maximum.accumulate(starts + sizes)])
        used = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[mask]
        place = np.searchsorted(ranges[0], used, "right") - 1
        inside = (place >= 0) & (used + np.uint64(itemsize) <= ranges[1][place])
        assert inside.all(), "a kernel leaves its tensors"

    found, builder = torch.Tensor.data_ptr, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
        checked(pointers.data, mask.data, interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        checked(pointers.data, mask.data, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(torch.Tensor, "data_ptr", asked)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
