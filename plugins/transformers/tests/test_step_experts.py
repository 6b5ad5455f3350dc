"""The kernels of a step's experts against their definitions, over shapes and routings, and row by row."""

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
step_experts = pytest.importorskip("polydraft_transformers.step_experts")
from polydraft_transformers import experts as implementations  # noqa: E402

LIMITS = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of float64, relative to the largest number


@pytest.mark.parametrize("lots", range(24), indirect=True)
def test_definition_and_rows_of_their_own(device, small, lots):
    dtype, rows = lots.choice(list(LIMITS)), lots.between(1, 2, 5, 16, 17, 40 if small else 128)
    experts = lots.between(4, 16) if small else lots.between(4, 16, 128)
    top_k = min(lots.between(1, 2, 8), experts)
    width = lots.between(16, 96, 200 if small else 2816)
    inner = lots.between(16, 24, 70 if small else 704)
    activation = lots.choice(step_experts.ACTIVATIONS)
    hidden = torch.randn(rows, 2 * width, device=device).to(dtype)[:, :width]
    gate_up = (torch.randn(experts, 2 * inner, width, device=device) / width**0.5).to(dtype)
    down = (torch.randn(experts, width, inner, device=device) / inner**0.5).to(dtype)
    chosen = torch.rand(rows, experts, device=device).topk(top_k).indices
    if lots.random() < 0.3:
        chosen = chosen[:1].expand(rows, -1).contiguous()  # as the padding rows of a step
    weights = torch.rand(rows, top_k, device=device)
    found = step_experts.mix(hidden, gate_up, down, weights, chosen, activation)
    # One by one: the definition copies the weights of every choice.
    for row in lots.sample(range(rows), min(rows, 3) if small else rows):
        part = slice(row, row + 1)
        wanted = step_experts.mix_by_definition(
            *(given.double() for given in (hidden[part], gate_up, down, weights[part])), chosen[part], activation
        )
        assert (found[part] - wanted).abs().max() / wanted.abs().max() < LIMITS[dtype]
        alone = step_experts.mix(hidden[part], gate_up, down, weights[part], chosen[part], activation)
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("lots", range(12), indirect=True)
def test_routes(device, lots):
    rows, experts, top_k = lots.between(1, 5, 70), lots.between(8, 60, 128, 256), lots.between(1, 8)
    scores = torch.randn(rows, experts, device=device) * lots.choice([0.1, 3.0, 40.0])
    scores = scores.to(lots.choice([torch.float32, torch.bfloat16]))
    scale = torch.rand(experts, device=device).to(scores.dtype)
    given = scores
    if lots.random() < 0.5:
        given = torch.stack([scores.float() - 1, torch.ones(rows, experts, device=device)])
        scores = given.sum(0).to(scores.dtype)
    weights, chosen = step_experts.route(given, scale, top_k)
    # Of equal scores the first expert: torch's topk promises no order.
    order = scores.double().sort(stable=True, dim=-1, descending=True).indices[:, :top_k]
    ties = scores.gather(-1, order) != scores.gather(-1, chosen)
    assert not ties.any()
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    shares = scores.double().softmax(-1).gather(-1, chosen)
    wanted = shares / shares.sum(-1, keepdim=True) * scale[chosen]
    assert (weights - wanted).abs().max() < 2e-6
    alone = step_experts.route(given[..., -1:, :], scale, top_k)
    assert torch.equal(alone[0][0], weights[-1])
    assert torch.equal(alone[1][0], chosen[-1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_choose_experts_that_exist_and_give_nan(device, value):
    scores = torch.zeros(2, 12, device=device)
    scores[0, 7] = value
    weights, chosen = step_experts.route(scores, torch.ones(12, device=device), 3)
    assert weights[0].isnan().all()
    assert chosen.tolist() == [[0, 1, 2] if math.isnan(value) else [7, 0, 1], [0, 1, 2]]
    assert weights[1].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("rows", [3, 150])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "Gemma4Text"])
def test_experts_of_transformers(device, kind, rows):
    import transformers
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    small = {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 8, "vocab_size": 32, "num_hidden_layers": 1}
    size = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
    own = {"Qwen3Moe": {"num_experts_per_tok": 2}, "Gemma4Text": {"enable_moe_block": True, "top_k_experts": 2}}
    if kind == "Gemma4Text":
        own[kind] |= {"hidden_size_per_layer_input": 0, "layer_types": ["full_attention"]}
    config = getattr(transformers, f"{kind}Config")(**small, **size, **own[kind])
    name = {"Qwen3Moe": "Qwen3MoeForCausalLM", "Gemma4Text": "Gemma4ForCausalLM"}[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).to(device).eval()
    named = implementations.experts_implementation(None, torch.float32, torch.device(device), fixed=False)
    assert named == implementations.FEW_ROWS
    (module,) = (part for part in model.modules() if hasattr(part, "gate_up_proj") and hasattr(part, "has_gate"))
    hidden = torch.randn(rows, 64, device=device)
    chosen = torch.rand(rows, 8, device=device).topk(2).indices
    weights = torch.rand(rows, 2, device=device)
    with torch.inference_mode():
        found, wanted = (ALL_EXPERTS_FUNCTIONS[way](module, hidden, chosen, weights) for way in (named, "batched_mm"))
    assert torch.allclose(found, wanted, atol=1e-5)
