"""What is read from config.json: both layouts of Gemma 4, roles, families and kinds."""

import json

import pytest
from polydraft.checkpoints.config import (
    KVShape,
    checkpoint_dtype,
    drafter_kind,
    eos_token_ids,
    family,
    has_experts,
    is_assistant,
    kv_shapes,
    layer_types,
    model_types,
    read_config,
    text_config,
)
from polydraft.errors import ModelFormatError

SLIDING, FULL = "sliding_attention", "full_attention"


def gemma4(**changes):
    return {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "layer_types": [SLIDING] * 5 + [FULL],
        **changes,
    }


def test_text_config_nested_or_not():
    nested = {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "hidden_size": 8}}
    assert text_config(nested)["hidden_size"] == 8
    assert text_config(nested["text_config"])["hidden_size"] == 8
    assert text_config({"text_config": None, "hidden_size": 3})["hidden_size"] == 3
    assert model_types(nested) == {"gemma4", "gemma4_text"}
    assert model_types({}) == frozenset()


def test_experts():
    assert has_experts({"text_config": {"num_experts": 8}})
    assert has_experts({"num_local_experts": 4})
    assert not has_experts({"text_config": {"num_experts": None}})
    assert not has_experts({})


@pytest.mark.parametrize("key", ["5", "05", 5])  # of twelve layers and more, Transformers pads the numbers
def test_new_layout_per_layer_config(key):
    config = gemma4(per_layer_config={"x": {"head_dim": 8}, key: {"head_dim": 64, "num_key_value_heads": 1}})
    assert kv_shapes(config) == {SLIDING: KVShape(2, 32), FULL: KVShape(1, 64)}


def test_old_layout_needs_k_eq_v_for_the_head_count():
    old = gemma4(global_head_dim=64, num_global_key_value_heads=1)
    assert kv_shapes(old)[FULL] == KVShape(2, 64), "without attention_k_eq_v the global head count is ignored"
    assert kv_shapes({**old, "attention_k_eq_v": True})[FULL] == KVShape(1, 64)


def test_old_and_new_layout_agree():
    old = gemma4(global_head_dim=64, num_global_key_value_heads=1, attention_k_eq_v=True)
    new = gemma4(per_layer_config={"5": {"head_dim": 64, "num_key_value_heads": 1}}, attention_k_eq_v=True)
    assert kv_shapes(old) == kv_shapes(new)


def test_defaults_of_the_architecture():
    assert kv_shapes({"model_type": "gemma4_text"}) == {SLIDING: KVShape(4, 256), FULL: KVShape(4, 512)}
    assert layer_types({"model_type": "gemma4_text", "num_hidden_layers": 7}) == [SLIDING] * 5 + [FULL, FULL]


def test_shared_layers_of_a_target_do_not_count():
    # The last two layers have other shapes, but they reuse the keys and values of earlier ones.
    config = gemma4(
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        num_kv_shared_layers=2,
        per_layer_config={"1": {"head_dim": 64}, "2": {"head_dim": 8}, "3": {"head_dim": 16}},
    )
    assert kv_shapes(config) == {SLIDING: KVShape(2, 32), FULL: KVShape(2, 64)}
    assistant = {"model_type": "gemma4_assistant", "text_config": {**config, "num_kv_shared_layers": 4}}
    assert kv_shapes(assistant)[FULL] == KVShape(2, 16), "an assistant shares all of its layers"


def test_unknown_architectures_say_nothing():
    assert kv_shapes({"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}) == {}
    assert kv_shapes({}) == {}
    assert kv_shapes({"model_type": "x", "layer_types": [FULL]}) == {}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "gemma4_assistant"}, "mtp"),
        ({"model_type": "gemma4_unified_assistant"}, "mtp"),
        ({"model_type": "llama"}, "draft-model"),
        ({"model_type": "eagle3", "speculators_model_type": "eagle3"}, "eagle3"),
        ({"speculators_model_type": "dflash"}, "dflash"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}, "eagle3"),
        ({"model_type": "qwen3", "architectures": ["DFlashDraftModel"]}, "dflash"),
        ({"architectures": None}, "draft-model"),
    ],
)
def test_drafter_kind(config, kind):
    assert drafter_kind(config) == kind


def test_family():
    assert family({"model_type": "gemma4_unified_assistant"}) == family({"model_type": "gemma4_unified_text"})
    assert family({"model_type": "gemma4_assistant"}) != family({"model_type": "gemma4_unified"})
    assert is_assistant({"model_type": "gemma4_assistant"})
    assert not is_assistant({})


@pytest.mark.parametrize(("content", "said"), [("{", "line 1"), ("[]", "list"), ("null", "NoneType")])
def test_broken_config_json(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelFormatError, match=said) as error:
        read_config(path, "my-model")
    assert "my-model" in error.value.message
    assert error.value.hint


def test_config_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        read_config(tmp_path / "config.json", "m")


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({}, None, set()),
        ({"eos_token_id": 1}, None, {1}),
        ({"eos_token_id": [1, 106]}, None, {1, 106}),
        ({"text_config": {"eos_token_id": 0}}, None, {0}),
        ({"eos_token_id": 2, "text_config": {"eos_token_id": 3}}, None, {2}),
        ({"eos_token_id": 1}, {"eos_token_id": [1, 106, 50]}, {1, 106, 50}),
        ({"eos_token_id": 1}, {"temperature": 1.0}, {1}),
    ],
)
def test_end_of_sequence_ids(tmp_path, config, generation, wanted):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(config, tmp_path) == wanted
    if generation is None:
        assert eos_token_ids(config) == wanted


def test_a_broken_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelFormatError, match="generation_config"):
        eos_token_ids({}, tmp_path)


@pytest.mark.parametrize("listed", [["a"], "a", [None], 1.5, True, [-1], [[1]], {"id": 1}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_that_are_no_token_ids(tmp_path, listed, file):
    (tmp_path / file).write_text(json.dumps({"eos_token_id": listed}))
    config = read_config(tmp_path / file, "m") if file == "config.json" else {}
    with pytest.raises(ModelFormatError, match="not a token id") as error:
        eos_token_ids(config, tmp_path)
    assert error.value.hint


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("model_type", 5),
        ("architectures", 5),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [5]),
        ("layer_types", 5),
        ("per_layer_config", [1]),
        ("num_hidden_layers", "x"),
        ("num_hidden_layers", -1),
        ("num_kv_shared_layers", [1]),
        ("head_dim", True),
        ("num_hidden_layers", 10**8),
        ("vocab_size", 10**12),
        ("hidden_size", 10**9),
        ("intermediate_size", [64, 10**9]),
        ("layer_types", ["full_attention"] * 5000),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_fields_of_wrong_types_and_impossible_sizes(tmp_path, field, wrong, nested):
    config = {"model_type": "gemma4", field: wrong}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    with pytest.raises(ModelFormatError, match=f"{field} in config.json of m") as error:
        read_config(tmp_path / "config.json", "m")
    assert error.value.hint


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000])
def test_json_that_python_does_not_parse(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        read_config(tmp_path / "config.json", "m")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "float32"),
    ],
)
def test_the_dtype_of_a_checkpoint_as_every_version_writes_it(config, dtype):
    assert checkpoint_dtype(config) == dtype
