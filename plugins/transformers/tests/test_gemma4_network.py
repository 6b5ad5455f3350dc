"""Our layers, masks and KV slots against Transformers' own forward over the whole text."""

import polydraft
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft_transformers.gemma4 import Gemma4Network, is_gemma4  # noqa: E402

TOKENS = [2, *(300 + (7 * i) % 600 for i in range(209))]  # three windows of 64
PAIRS = ["tiny-e2b", "tiny-31b", "tiny-26b"]


@pytest.fixture(scope="module", params=PAIRS)
def target(request):
    with polydraft.load(
        f"builtin:{request.param}", backend="transformers", dtype="float32", device="cpu", drafter=None
    ) as session:
        yield session.engine.target


@pytest.fixture(scope="module")
def upstream(target):
    with torch.inference_mode():
        return target.model(torch.tensor([TOKENS])).logits[0]


def test_the_short_way_is_taken(target):
    assert isinstance(target.network, Gemma4Network)


@pytest.mark.parametrize("chunk", [17, 64, 100, 512])
def test_prompts_in_chunks(target, upstream, chunk):
    cache = target.open_cache()
    with torch.inference_mode():
        hidden = [target.prefill(cache, TOKENS[i : i + chunk]) for i in range(0, len(TOKENS), chunk)]
        logits = target.logits(torch.cat(hidden))
    assert (logits - upstream).abs().max() < 1e-3


@pytest.mark.parametrize("prompt", [1, 30, 63, 64, 65, 128])
def test_steps_with_rejected_drafts_between(target, upstream, prompt):
    cache = target.open_cache()
    rows = target.step_rows
    with torch.inference_mode():
        target.prefill(cache, TOKENS[:prompt])
        position = prompt
        while position < len(TOKENS) - rows:
            target.step(cache, [5] * rows)  # all rejected
            cache.rollback(position)
            _, logits = target.step(cache, TOKENS[position : position + 1])
            assert (logits[0] - upstream[position]).abs().max() < 1e-3
            position += 1


def test_a_cache_that_was_used_before_remembers_nothing(target, upstream):
    cache = target.open_cache()
    with torch.inference_mode():
        target.prefill(cache, [7] * 400)
        target.give_back(cache)
        again = target.open_cache()
        hidden = target.prefill(again, TOKENS)
        assert again is cache
        assert (target.logits(hidden) - upstream).abs().max() < 1e-3


def test_each_weight_is_stored_once(target):
    layer = target.model.model.layers[0]
    gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()


def test_other_projections_are_left_to_transformers(target):
    model = target.model.model
    original = model.layers[0].self_attn.o_proj
    model.layers[0].self_attn.o_proj = torch.nn.Linear(original.in_features, original.out_features, bias=True)
    try:
        assert not is_gemma4(model)
    finally:
        model.layers[0].self_attn.o_proj = original
    assert is_gemma4(model)


def test_another_activation_is_left_to_transformers(target):
    config = target.model.model.config
    usual, config.hidden_activation = config.hidden_activation, "silu"
    try:
        assert not is_gemma4(target.model.model)
    finally:
        config.hidden_activation = usual
