"""The kernel for a step's attention against its definition in float64, around every edge, and bit by bit."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
step_attention = pytest.importorskip("polydraft_transformers.step_attention")

LIMITS = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def places_of(pairs):
    """As ``KvCache.places`` gives them: of several sequences, keys and values of each."""
    rows = [[keys.data_ptr(), values.data_ptr(), keys.shape[2]] for keys, values in pairs]
    return torch.tensor(rows, device=pairs[0][0].device)


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


@pytest.mark.parametrize("lots", range(40), indirect=True)
def test_definition_and_rows_of_their_own(device, small, monkeypatch, lots):
    dim, groups = lots.choice([16, 64, 128, 256, 512]), lots.between(1, 2, 4, 8)
    kv_heads = lots.between(1, 2) if small else lots.between(1, 2, 8)
    if small:
        monkeypatch.setattr(step_attention, "_PARTS", lots.choice([2, 6]))
    near = lots.choice([0, 0, 1])
    rows = 1 if near else lots.between(1, 2, 5, 8, 17)
    window = lots.choice([None, lots.between(1, 64, 512)])
    if window is None:
        slots = lots.between(256, 512 if small else 8192)
        first = lots.between(0, 1, 31, 32, 63, 64, slots - rows - near)
    else:
        slots = -(-(window + 2 * rows + 2) // 8) * 8
        first = lots.between(0, 1, slots - 1, slots, window, 70_000)
    positions = torch.arange(rows, device=device) + first + near
    dtype, sequences = lots.choice(list(LIMITS)), lots.choice([1, 1, 3])
    sharpness = lots.choice([1, 40])  # far beyond what an exponential can hold
    queries = torch.randn(sequences * rows, 2 * kv_heads * groups, dim, device=device) * sharpness
    queries = (queries / dim**0.25).to(dtype)
    queries = queries[:, : kv_heads * groups]  # strided, as a part of a joined projection
    pairs, every, wanted = [], [], []
    for number, own in enumerate(queries.split(rows)):
        # Another length, and another size where the layer does not slide.
        size = (1, kv_heads, slots if window is not None else slots << number, dim)
        pairs.append([(torch.randn(size, device=device) / dim**scale).to(dtype) for scale in (0.25, 0.0)])
        every.append(positions + 37 * number * (window is not None or slots - rows > int(positions[-1]) + 80))
        wanted.append(by_definition(own, *pairs[-1], every[-1], near, window))
    given = {"kv_heads": kv_heads, "near": near, "window": window}
    found = step_attention.attend(queries, places_of(pairs), torch.cat(every), **given)
    limit = LIMITS[dtype] * (sharpness if dtype == torch.float32 else 1)
    assert (found.double() - torch.cat(wanted)).abs().max() < limit
    for row in lots.sample(range(sequences * rows), 1 if small else sequences * rows):
        place = places_of(pairs[row // rows : row // rows + 1])
        alone = step_attention.attend(queries[row : row + 1], place, torch.cat(every)[row : row + 1], **given)
        assert torch.equal(alone[0], found[row])


def test_where_the_kernel_runs(monkeypatch):
    monkeypatch.setattr(step_attention, "runs_kernels", lambda device: device.type == "cuda")
    assert not step_attention.can_attend(torch.device("cpu"), {64})
    assert step_attention.can_attend(torch.device("cuda"), {64, 512})
    assert not step_attention.can_attend(torch.device("cuda"), {64, 96})
