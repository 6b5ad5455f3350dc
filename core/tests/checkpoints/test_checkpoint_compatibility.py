"""Pairs that fit and pairs that do not, on the configs of trained pairs and on changed ones."""

import copy

import pytest
from polydraft.checkpoints.compatibility import check_pair, check_target
from polydraft.checkpoints.config import read_config
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import PairMismatchError

PAIRS = [("tiny-e2b", "tiny-e2b-assistant"), ("tiny-31b", "tiny-31b-assistant"), ("tiny-26b", "tiny-26b-assistant")]


@pytest.fixture
def model(builtin_data):
    def make(name, edit=None):
        path = builtin_data / name
        config = copy.deepcopy(read_config(path / "config.json", name))
        if edit:
            edit(config)
        return ModelSource(id=name, kind="local", path=path, format="safetensors", config=config)

    return make


@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_trained_pairs_fit(model, target, drafter):
    check_pair(model(target), model(drafter), "mtp")


@pytest.mark.parametrize("target", [t for t, _ in PAIRS])
@pytest.mark.parametrize("drafter", [d for _, d in PAIRS])
def test_every_other_combination_is_refused(model, target, drafter):
    """All have the same tokens, and two of the targets the same width."""
    if (target, drafter) not in PAIRS:
        with pytest.raises(PairMismatchError, match="is not a drafter for") as error:
            check_pair(model(target), model(drafter), "mtp")
        assert error.value.hint


def test_nested_target_fits(model):
    """A conditional-generation checkpoint nests the text model's config."""
    nested = model("tiny-e2b", lambda c: c.update(text_config=dict(c), model_type="gemma4"))
    check_pair(nested, model("tiny-e2b-assistant"), "mtp")


def test_old_layout_of_the_target_fits(model):
    def to_old(config):
        del config["per_layer_config"]
        config.update(global_head_dim=64, num_global_key_value_heads=1, attention_k_eq_v=True)

    check_pair(model("tiny-31b", to_old), model("tiny-31b-assistant"), "mtp")


def text(edit):
    return lambda config: edit(config["text_config"])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c.update(backbone_hidden_size=96), "made for a target of hidden size 96, this one has 160"),
        (text(lambda t: t.update(vocab_size=4096)), "its vocabulary size is 4096, the target's 2048"),
        (text(lambda t: t.update(num_key_value_heads=2)), "in sliding-attention layers it reads 2 KV heads of 32"),
        (text(lambda t: t.update(head_dim=16)), "reads 1 KV head of 16, the target has 1 KV head of 32"),
        (
            text(lambda t: t["per_layer_config"]["3"].update(head_dim=128)),
            "in full-attention layers it reads 1 KV head of",
        ),
        (text(lambda t: t.update(sliding_window=512)), "its sliding window is 512, the target's 64"),
        (
            text(lambda t: t.update(layer_types=["chunked_attention"] * 3 + ["full_attention"])),
            "chunked-attention layers, of which the target has none",
        ),
    ],
)
def test_what_differs_is_said(model, edit, said):
    with pytest.raises(PairMismatchError, match=said) as error:
        check_pair(model("tiny-e2b"), model("tiny-e2b-assistant", edit), "mtp")
    assert "polydraft pairs" in error.value.hint


def test_all_differences_are_said_at_once(model):
    with pytest.raises(PairMismatchError, match=r"hidden size 192.*2 KV heads"):
        check_pair(model("tiny-e2b"), model("tiny-31b-assistant"), "mtp")


def test_target_without_full_attention_layers(model):
    sliding = model("tiny-e2b", lambda c: c.update(model_type="gemma4", layer_types=["sliding_attention"] * 8))
    # Gemma 4 makes its last layer a full one whatever the config says, but that one stores no keys and values here.
    with pytest.raises(PairMismatchError, match="full-attention layers, of which the target has none"):
        check_pair(sliding, model("tiny-e2b-assistant"), "mtp")


def test_assistant_of_another_architecture(model):
    unified = model("tiny-e2b-assistant", lambda c: c.update(model_type="gemma4_unified_assistant"))
    with pytest.raises(PairMismatchError, match="a drafter for gemma4_unified targets, but tiny-e2b is gemma4_text"):
        check_pair(model("tiny-e2b"), unified, "mtp")
    check_pair(model("tiny-e2b", lambda c: c.update(model_type="gemma4_unified_text")), unified, "mtp")


def test_roles(model):
    with pytest.raises(PairMismatchError, match=r"is a target .* not an assistant"):
        check_pair(model("tiny-e2b"), model("tiny-26b"), "mtp")
    with pytest.raises(PairMismatchError, match="swapped") as error:
        check_pair(model("tiny-e2b-assistant"), model("tiny-e2b"), "mtp")
    assert "drafter='tiny-e2b-assistant'" in error.value.hint
    with pytest.raises(PairMismatchError, match=r"is a drafter .* not a target"):
        check_pair(model("tiny-e2b-assistant"), model("tiny-e2b-assistant"), "mtp")
    with pytest.raises(PairMismatchError, match="is a drafter"):
        check_target(model("tiny-31b-assistant"))
    with pytest.raises(PairMismatchError, match="cannot draft as a model of its own"):
        check_pair(model("tiny-e2b"), model("tiny-e2b-assistant"), "draft-model")
    with pytest.raises(PairMismatchError, match="a drafter for gemma4 targets, but tiny-llama is llama"):
        check_pair(model("tiny-llama"), model("tiny-e2b-assistant"), "mtp")


def test_any_model_with_the_same_tokens_may_draft(model):
    check_pair(model("tiny-31b"), model("tiny-e2b"), "draft-model")
    check_pair(model("tiny-llama"), model("tiny-llama-draft"), "draft-model")
    check_pair(model("tiny-e2b"), model("tiny-e2b"), "draft-model")


def test_draft_model_with_other_tokens(model, make_model, builtin_data):
    import json

    tokenizer = json.loads((builtin_data / "tiny-llama/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    (a, i), (b, j) = list(vocab.items())[1000:1002]
    vocab[a], vocab[b] = j, i
    path = make_model("other", {"model_type": "llama"}, tokenizer=tokenizer)
    other = ModelSource(id="other", kind="local", path=path, format="safetensors", config={"model_type": "llama"})
    with pytest.raises(PairMismatchError, match="do not have the same tokens: token"):
        check_pair(model("tiny-llama"), other, "draft-model")


def test_files_without_a_config_are_left_to_the_plugin():
    gguf = ModelSource(id="t.gguf", kind="local", format="gguf")
    check_pair(gguf, gguf.model_copy(update={"id": "mtp-t.gguf"}), "mtp")
    check_pair(gguf, gguf, "draft-model")


def test_tokenizers_of_hub_models_are_fetched(fake_hub, builtin_data):
    good = (builtin_data / "tiny-e2b/tokenizer.json").read_bytes()
    bad = good.replace(b'"<unk>"', b'"<odd>"')
    fake_hub.add("org/big", {"config.json": {}, "tokenizer.json": good})
    fake_hub.add("org/small", {"config.json": {}, "tokenizer.json": good})
    fake_hub.add("org/odd", {"config.json": {}, "tokenizer.json": bad})
    fake_hub.add("org/without", {"config.json": {}})

    def source(name):
        return ModelSource(id=name, kind="hub", format="safetensors", config={"model_type": "llama"})

    check_pair(source("org/big"), source("org/small"), "draft-model", hub=HubOptions())
    check_pair(source("org/big"), source("org/without"), "draft-model", hub=HubOptions())
    with pytest.raises(PairMismatchError, match=r"token '<(unk|odd)>'"):
        check_pair(source("org/big"), source("org/odd"), "draft-model", hub=HubOptions())
    check_pair(source("org/big"), source("org/odd"), "draft-model")
