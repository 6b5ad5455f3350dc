"""Our layers, masks and KV slots against Transformers' own forward over the whole text."""

import threading

import polydraft
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft_transformers.gemma4 import Gemma4Network, is_gemma4  # noqa: E402
from polydraft_transformers.sequence import TransformersSequence  # noqa: E402

TOKENS = [2, *(300 + (7 * i) % 600 for i in range(209))]  # three windows of 64
PAIRS = ["tiny-e2b", "tiny-31b", "tiny-26b"]


@pytest.fixture(scope="module", params=PAIRS)
def target(request):
    with polydraft.load(
        f"builtin:{request.param}", backend="transformers", dtype="float32", device="cpu", drafter=None
    ) as session:
        yield session.engine.target


def opened(target, chunk=512):
    return TransformersSequence(target, chunk, threading.Lock())


@pytest.fixture(scope="module")
def upstream(target):
    with torch.inference_mode():
        return target.model(torch.tensor([TOKENS])).logits[0]


def test_the_short_way_is_taken(target):
    assert isinstance(target.network, Gemma4Network)


@pytest.mark.parametrize("chunk", [17, 64, 100, 512])
def test_prompts_in_chunks(target, upstream, chunk):
    sequence = opened(target)
    with torch.inference_mode():
        for start in range(0, len(TOKENS), chunk):
            hidden = sequence.run_prompt(TOKENS[start : start + chunk])
            end = sequence.length
            wanted = upstream[end - len(hidden) : end]
            assert len(hidden) == min(target.step_rows, end - start)
            assert (target.logits(hidden) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("prompt", [1, 30, 63, 64, 65, 128])
def test_steps_with_rejected_drafts_between(target, upstream, prompt):
    sequence = opened(target)
    rows = target.step_rows
    with torch.inference_mode():
        sequence.run_prompt(TOKENS[:prompt])
        position = prompt
        while position < len(TOKENS) - rows:
            sequence.run_step([5] * rows)  # all rejected
            sequence.rollback(position)
            _, logits = sequence.run_step(TOKENS[position : position + 1])
            assert (logits[0] - upstream[position]).abs().max() < 1e-3
            position += 1


def test_a_cache_that_was_used_before_remembers_nothing(target, upstream):
    first = opened(target)
    cache = first.cache
    with torch.inference_mode():
        first.run_prompt([7] * 400)
        first.close()
        again = opened(target)
        assert again.cache is cache
        logits = target.logits(again.run_prompt(TOKENS))
        assert (logits - upstream[-len(logits) :]).abs().max() < 1e-3


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
