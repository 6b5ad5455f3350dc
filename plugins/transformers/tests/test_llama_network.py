"""Our layers of Llama and Qwen3 against Transformers' own forward over the whole text."""

import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from polydraft_transformers.decoder import Decoder  # noqa: E402
from polydraft_transformers.llama import LlamaNetwork  # noqa: E402
from polydraft_transformers.sequence import TransformersSequence  # noqa: E402

TOKENS = [2, *(30 + (7 * i) % 60 for i in range(149))]
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama": ("Llama", {}),
    "one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "all-kv-heads": ("Llama", {"num_key_value_heads": 6}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {}),
    "qwen3-sliding": ("Qwen3", {"layer_types": SLIDING, "sliding_window": 24, "use_sliding_window": True}),
}
OTHERS = {
    "bias": ("Llama", {"attention_bias": True}),
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
}


def random_model(case, dtype=torch.float32):
    family, own = case
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SIZES | own, initializer_range=0.2)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.to(dtype)


@pytest.fixture(params=CASES)
def model(request):
    return random_model(CASES[request.param])


def logits_of(sequence, target, chunk, rows):
    """Of all tokens: half of them as a prompt in chunks, the others in steps after rejected drafts."""
    half = 77
    parts = (TOKENS[start : min(start + chunk, half)] for start in range(0, half, chunk))
    found = [target.logits(sequence.run_prompt(part)) for part in parts]
    while sequence.length + rows < len(TOKENS):
        length = sequence.length
        sequence.run_step([5] * rows)  # all rejected
        sequence.rollback(length)
        found.append(sequence.run_step(TOKENS[length : length + 1 + length % rows])[1].clone())
    return torch.cat(found)


@pytest.mark.parametrize("chunk", [20, 512])
def test_prompts_and_steps(model, chunk):
    with torch.inference_mode():
        wanted = model(torch.tensor([TOKENS])).logits[0]
        target = Decoder(model, 5)
        assert isinstance(target.network, LlamaNetwork)
        found = logits_of(TransformersSequence(target, chunk, threading.Lock()), target, chunk, 5)
        assert (found - wanted[: len(found)]).abs().max() < 1e-3
        # The module is whole, and each weight is stored once.
        assert torch.equal(model(torch.tensor([TOKENS])).logits[0], wanted)
        layer = model.model.layers[0].self_attn
        joined = target.network._layers[0].projection
        assert layer.q_proj.weight.data_ptr() == joined.data_ptr()
        assert layer.v_proj.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_it_is_as_near_to_float32_as_the_module_is(name):
    with torch.inference_mode():
        exact = random_model(CASES[name], torch.bfloat16).float()(torch.tensor([TOKENS])).logits[0]
        model = random_model(CASES[name], torch.bfloat16)
        module = (model(torch.tensor([TOKENS])).logits[0] - exact).abs()
        target = Decoder(model, 5)
        found = logits_of(TransformersSequence(target, 512, threading.Lock()), target, 512, 5)
        ours = (found - exact[: len(found)]).abs()
        assert ours.mean() < 1.2 * module.mean()


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_does_not_know_runs_through_the_module(name):
    assert not isinstance(Decoder(random_model(OTHERS[name]), 5).network, LlamaNetwork)
