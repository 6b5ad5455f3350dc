"""The kernel for a prompt's attention against its definition in float64, around the edges of tiles and windows."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
prompt_attention = pytest.importorskip("polydraft_transformers.prompt_attention")

LIMITS = {torch.float16: 6e-3, torch.bfloat16: 5e-2}


def by_definition(queries, keys, values, window):
    """In float64, with the masks of ``KvCache.begin_prompt``."""
    queries, keys, values = queries.double(), keys[0].double(), values[0].double()
    count, groups = keys.shape[1], queries.shape[1] // keys.shape[0]
    key = torch.arange(count, device=queries.device)
    own = key[-len(queries) :, None]
    seen = key <= own
    if window is not None:
        seen &= key > own - window
    scores = torch.einsum("rhd,hkd->hrk", queries, keys.repeat_interleave(groups, 0))
    weights = scores.masked_fill(~seen[None], -torch.inf).softmax(-1)
    return torch.einsum("hrk,hkd->rhd", weights, values.repeat_interleave(groups, 0))


@pytest.mark.parametrize("lots", range(60), indirect=True)
def test_definition(device, small, lots):
    dim, groups = lots.choice([16, 64, 256, 512]), lots.between(1, 2) if small else lots.between(1, 2, 8)
    kv_heads = lots.between(1, 2) if small else lots.between(1, 2, 4)
    rows = lots.between(1, 5, 63, 64, 65, 127, 128, 129, 140 if small else 300)
    earlier = lots.between(0, 1, 31, 32, 33, 63, 64, 65, 200 if small else 700)
    window = lots.choice([None, lots.between(1, 33, 64, 512)])
    if window is not None and lots.random() < 0.4:  # the first row's window begins where a block does, or beside it
        earlier = max(0, window + lots.choice([-2, -1, 0, 63]))
    dtype = lots.choice(list(LIMITS))
    sharpness = lots.choice([1, 40])  # far beyond what an exponential can hold
    queries = (torch.randn(rows, kv_heads * groups, dim, device=device) * sharpness / dim**0.25).to(dtype)
    size = (1, kv_heads, rows + earlier + 50, dim)
    keys, values = (
        (torch.randn(size, device=device) / dim**scale).to(dtype)[:, :, : rows + earlier] for scale in (0.25, 0.0)
    )
    found = prompt_attention.attend_prompt(queries, keys, values, window=window)
    wanted = by_definition(queries, keys, values, window)
    assert (found.double() - wanted).abs().max() < LIMITS[dtype]


def test_where_the_kernel_runs(monkeypatch):
    can_attend = prompt_attention.can_attend_prompt
    cuda = torch.device("cuda")
    monkeypatch.setattr(prompt_attention, "runs_kernels", lambda device: device.type == "cuda")
    assert can_attend(cuda, torch.bfloat16, {64, 512})
    assert not can_attend(cuda, torch.float32, {64})
    assert not can_attend(cuda, torch.bfloat16, {64, 96})
    assert not can_attend(torch.device("cpu"), torch.bfloat16, {64})
