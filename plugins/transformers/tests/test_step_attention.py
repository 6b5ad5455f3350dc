"""The kernel for a step's attention against its definition in float64, around every edge, and bit by bit."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
step_attention = pytest.importorskip("polydraft_transformers.step_attention")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LIMITS = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def places_of(pairs):
    """As ``KvCache.places`` gives them: of several sequences, keys and values of each."""
    return torch.tensor([[keys.data_ptr(), values.data_ptr(), keys.shape[2]] for keys, values in pairs], device="cuda")


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
    dtype, sequences = lots.choice(list(LIMITS)), lots.choice([1, 1, 3])
    queries = (torch.randn(sequences * rows, 2 * kv_heads * groups, dim, device="cuda") / dim**0.25).to(dtype)
    queries = queries[:, : kv_heads * groups]  # strided, as a part of a joined projection
    pairs, every, wanted = [], [], []
    for number, own in enumerate(queries.split(rows)):
        # Another length, and another size where the layer does not slide.
        size = (1, kv_heads, slots if window is not None else slots << number, dim)
        pairs.append([(torch.randn(size, device="cuda") / dim**scale).to(dtype) for scale in (0.25, 0.0)])
        every.append(positions + 37 * number * (window is not None or slots - rows > int(positions[-1]) + 80))
        wanted.append(by_definition(own, *pairs[-1], every[-1], near, window))
    given = {"kv_heads": kv_heads, "near": near, "window": window}
    found = step_attention.attend(queries, places_of(pairs), torch.cat(every), **given)
    assert (found.double() - torch.cat(wanted)).abs().max() < LIMITS[dtype]
    for row in range(sequences * rows):
        place = places_of(pairs[row // rows : row // rows + 1])
        alone = step_attention.attend(queries[row : row + 1], place, torch.cat(every)[row : row + 1], **given)
        assert torch.equal(alone[0], found[row])


def test_only_on_gpus_with_triton(monkeypatch):
    assert not step_attention.can_attend(torch.device("cpu"), {64})
    monkeypatch.setattr(step_attention, "triton", None)
    assert not step_attention.can_attend(torch.device("cuda"), {64})
    monkeypatch.setattr(step_attention, "triton", object())
    assert step_attention.can_attend(torch.device("cuda"), {64, 512})
    assert not step_attention.can_attend(torch.device("cuda"), {64, 96})
