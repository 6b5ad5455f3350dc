"""The kernel for a step's attention against its definition in float64, around every edge, and bit by bit."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
step_attention = pytest.importorskip("polydraft_transformers.step_attention")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LIMITS = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def by_definition(queries, keys, values, positions, near, window):
    """In float64, with the masks of ``KvCache.begin_step``."""
    queries, keys, values = queries.double(), keys[0].double(), values[0].double()
    slots, groups = keys.shape[1], queries.shape[1] // keys.shape[0]
    slot, column = torch.arange(slots, device=queries.device), positions[:, None]
    seen = slot + near <= column
    if window is not None:
        seen = (column - near - slot) % slots < (column + 1 - near).clamp(max=window + near)
    scores = torch.einsum("rhd,hsd->hrs", queries, keys.repeat_interleave(groups, 0))
    weights = scores.masked_fill(~seen[None], -torch.inf).softmax(-1)
    return torch.einsum("hrs,hsd->rhd", weights, values.repeat_interleave(groups, 0))


@needs_gpu
@pytest.mark.parametrize("trial", range(40))
def test_definition_and_rows_of_their_own(trial):
    lots = random.Random(trial)
    torch.manual_seed(trial)
    dim, kv_heads, groups = lots.choice([16, 64, 128, 256, 512]), lots.choice([1, 2, 8]), lots.choice([1, 2, 4, 8])
    near = lots.choice([0, 0, 1])
    rows = 1 if near else lots.choice([1, 2, 5, 8, 17])
    window = lots.choice([None, 64, 512])
    slots = lots.choice([256, 1024, 8192]) if window is None else -(-(window + 2 * rows + 2) // 8) * 8
    edges = (0, 1, 31, 32, 63, 64, slots - rows) if window is None else (0, 1, slots - 1, slots, window, 70_000)
    positions = torch.arange(rows, device="cuda") + lots.choice(edges) + near
    dtype = lots.choice(list(LIMITS))
    size = (1, kv_heads, slots, dim)
    queries = (torch.randn(rows, 2 * kv_heads * groups, dim, device="cuda") / dim**0.25).to(dtype)
    queries = queries[:, : kv_heads * groups]  # strided, as a part of a joined projection
    keys, values = ((torch.randn(size, device="cuda") / dim**scale).to(dtype) for scale in (0.25, 0.0))
    found = step_attention.attend(queries, keys, values, positions, near=near, window=window)
    wanted = by_definition(queries, keys, values, positions, near, window)
    assert (found.double() - wanted).abs().max() < LIMITS[dtype]
    for row in range(rows):
        alone = step_attention.attend(
            queries[row : row + 1], keys, values, positions[row : row + 1], near=near, window=window
        )
        assert torch.equal(alone[0], found[row])


def test_only_on_gpus_with_triton(monkeypatch):
    assert not step_attention.can_attend(torch.device("cpu"), {64})
    monkeypatch.setattr(step_attention, "triton", None)
    assert not step_attention.can_attend(torch.device("cuda"), {64})
    monkeypatch.setattr(step_attention, "triton", object())
    assert step_attention.can_attend(torch.device("cuda"), {64, 512})
    assert not step_attention.can_attend(torch.device("cuda"), {64, 96})
