"""The kernel for a prompt's attention against its definition in float64, around the edges of tiles and windows."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
prompt_attention = pytest.importorskip("polydraft_transformers.prompt_attention")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


@needs_gpu
@pytest.mark.parametrize("trial", range(40))
def test_definition(trial):
    lots = random.Random(trial)
    torch.manual_seed(trial)
    dim, kv_heads, groups = lots.choice([16, 64, 256, 512]), lots.choice([1, 2, 4]), lots.choice([1, 2, 8])
    rows, earlier = lots.choice([1, 5, 63, 64, 65, 300]), lots.choice([0, 1, 31, 32, 100, 700])
    window = lots.choice([None, None, 1, 33, 64, 512])
    dtype = lots.choice(list(LIMITS))
    queries = (torch.randn(rows, kv_heads * groups, dim, device="cuda") / dim**0.25).to(dtype)
    size = (1, kv_heads, rows + earlier + 50, dim)
    keys, values = (
        (torch.randn(size, device="cuda") / dim**scale).to(dtype)[:, :, : rows + earlier] for scale in (0.25, 0.0)
    )
    found = prompt_attention.attend_prompt(queries, keys, values, window=window)
    wanted = by_definition(queries, keys, values, window)
    assert (found.double() - wanted).abs().max() < LIMITS[dtype]


def test_only_on_gpus_with_triton(monkeypatch):
    can_attend = prompt_attention.can_attend_prompt
    cuda = torch.device("cuda")
    monkeypatch.setattr(prompt_attention, "triton", object())
    assert can_attend(cuda, torch.bfloat16, {64, 512})
    assert not can_attend(cuda, torch.float32, {64})
    assert not can_attend(cuda, torch.bfloat16, {64, 96})
    assert not can_attend(torch.device("cpu"), torch.bfloat16, {64})
    monkeypatch.setattr(prompt_attention, "triton", None)
    assert not can_attend(cuda, torch.bfloat16, {64})
