"""Old and new configs of Transformers, translated for mlx-lm."""

import json

import pytest
from polydraft.errors import ModelFormatError, UnsupportedError

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft_mlx.config import overrides  # noqa: E402


def config_of(name):
    return json.loads((pairs.path(name) / "config.json").read_text())


def test_per_layer_config_becomes_global_heads():
    found = overrides(config_of("tiny-31b"), "x")
    assert (found["head_dim"], found["global_head_dim"]) == (32, 64)
    assert (found["num_key_value_heads"], found["num_global_key_value_heads"]) == (2, 1)
    assert overrides(config_of("tiny-e2b"), "x")["global_head_dim"] == 64


def test_numbers_of_layers_may_be_padded_with_zeros():
    config = config_of("tiny-31b")
    padded = {**config, "per_layer_config": {f"{key:0>2}": own for key, own in config["per_layer_config"].items()}}
    assert overrides(padded, "x") == overrides(config, "x")


def test_the_old_layout_stays_as_it_is():
    config = config_of("tiny-31b")
    config.pop("per_layer_config")
    config.update(global_head_dim=64, num_global_key_value_heads=1)
    assert {**config, **overrides(config, "x")} == config


def test_fields_left_out_have_the_defaults_of_transformers():
    found = overrides({"model_type": "gemma4_text"}, "x")
    assert found["num_kv_shared_layers"] == 0
    assert found["use_double_wide_mlp"] is False
    assert found["final_logit_softcapping"] is None
    assert found["num_hidden_layers"] == len(found["layer_types"]) == 30
    assert found["layer_types"][5] == found["layer_types"][-1] == "full_attention"


def test_the_defaults_are_those_of_the_installed_transformers():
    from polydraft_mlx.config import _GEMMA4_DEFAULTS
    from transformers import Gemma4TextConfig

    theirs = Gemma4TextConfig().to_dict()
    wanted = {key: theirs[key] for key in _GEMMA4_DEFAULTS if key in theirs}
    assert {key: _GEMMA4_DEFAULTS[key] for key in wanted} == wanted
    assert set(_GEMMA4_DEFAULTS) - set(wanted) <= {"global_head_dim"}


def test_the_wrapper_gets_its_text_models_vocabulary():
    text = config_of("tiny-e2b")
    found = overrides({"model_type": "gemma4", "text_config": text, "vision_config": {}}, "x")
    assert found["vocab_size"] == found["text_config"]["vocab_size"] == 2048
    assert found["text_config"]["global_head_dim"] == 64


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"per_layer_config": {"0": {"intermediate_size": 9}}}, ModelFormatError, "intermediate_size"),
        ({"per_layer_config": {"0": {"head_dim": 16}}}, ModelFormatError, "one attention type differ"),
        ({"attention_k_eq_v": False}, ModelFormatError, "attention_k_eq_v"),
        ({"use_bidirectional_attention": "all"}, UnsupportedError, "bidirectional"),
    ],
)
def test_what_mlx_lm_cannot_express(change, error, words):
    with pytest.raises(error, match=words):
        overrides({**config_of("tiny-31b"), **change}, "x")


def test_rope_parameters_of_other_models():
    llama = {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}
    assert overrides(llama, "x") == {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    assert overrides({"model_type": "llama", "rope_theta": 1e4}, "x") == {}
    assert overrides({**llama, "rope_theta": 7.0, "rope_scaling": None}, "x") == {}
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert overrides({"model_type": "gemma3_text", "rope_parameters": nested}, "x") == {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
