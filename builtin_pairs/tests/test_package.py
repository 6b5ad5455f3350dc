"""The package's data and API; needs neither torch nor transformers."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import polydraft_builtin_pairs as builtin
import pytest
from polydraft_builtin_pairs import _data

if TYPE_CHECKING:
    from pathlib import Path

GEMMA = ("tiny-e2b", "tiny-31b", "tiny-26b")
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
LIMIT_BYTES = 24_000_000


def read(name: str, file: str = "config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((builtin.path(name) / file).read_text(encoding="utf-8"))
    return content


def header(name: str) -> dict[str, dict[str, Any]]:
    with (builtin.path(name) / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors: dict[str, dict[str, Any]] = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return tensors


def parameters(name: str) -> int:
    total = 0
    for tensor in header(name).values():
        if tensor["dtype"] == "BF16":
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
    return total


def test_every_name_is_a_complete_folder() -> None:
    assert set(builtin.names()) == {*builtin.pairs(), *builtin.pairs().values()}
    for name in builtin.names():
        assert {file.name for file in builtin.path(name).iterdir()} == FILES


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(builtin.UnknownNameError, match="tiny-e2b, tiny-e2b-assistant") as caught:
        builtin.path("gemma")
    assert isinstance(caught.value, KeyError)
    assert caught.value.name == "gemma"


def test_pairs_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        builtin.pairs()["tiny-e2b"] = "other"  # type: ignore[index]  # pyright: ignore[reportIndexIssue]


def test_data_is_intact_and_small() -> None:
    builtin.verify()
    assert sum(file.stat().st_size for file in _data.DATA.rglob("*") if file.is_file()) <= LIMIT_BYTES


def test_verify_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "m").mkdir(parents=True)
    (tmp_path / "data" / "m" / "a").write_bytes(b"a")
    (tmp_path / "data" / "m" / "extra").write_bytes(b"")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  data/m/a\n{'0' * 64}  data/m/b\n")
    monkeypatch.setattr(_data, "ROOT", tmp_path)
    monkeypatch.setattr(_data, "DATA", tmp_path / "data")
    monkeypatch.setattr(_data, "CHECKSUMS", tmp_path / "SHA256SUMS")
    with pytest.raises(builtin.DataError) as caught:
        builtin.verify()
    for fault in ("data/m/a: changed", "data/m/b: missing", "data/m/extra: not listed"):
        assert fault in str(caught.value)


@pytest.mark.parametrize("name", builtin.names())
def test_weights_are_bf16_and_stored_once(name: str) -> None:
    tensors = header(name)
    assert {tensor["dtype"] for key, tensor in tensors.items() if not key.endswith("token_ordering")} == {"BF16"}
    assert "lm_head.weight" not in tensors
    limit = 3_000_000 if name in builtin.pairs() else 600_000
    assert parameters(name) <= limit


def test_one_tokenizer_for_all() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(builtin.path(name) / file).read_bytes() for name in builtin.names()}) == 1


def test_stop_ids_are_a_list_of_gemma_tokens() -> None:
    tokens = {token["content"]: token["id"] for token in read("tiny-e2b", "tokenizer.json")["added_tokens"]}
    wanted = [tokens["<eos>"], tokens["<turn|>"], tokens["<|tool_response>"]]
    for name in builtin.names():
        assert read(name, "generation_config.json")["eos_token_id"] == wanted


@pytest.mark.parametrize("name", GEMMA)
def test_drafter_fits_its_target(name: str) -> None:
    target, drafter = read(name), read(builtin.pairs()[name])
    text = drafter["text_config"]
    assert drafter["backbone_hidden_size"] == target["hidden_size"]
    assert text["num_kv_shared_layers"] == text["num_hidden_layers"]
    assert set(text["layer_types"]) == set(target["layer_types"])
    for key in ("head_dim", "num_key_value_heads", "sliding_window", "vocab_size", "rope_parameters"):
        assert text[key] == target[key]
    wide = {json.dumps(value, sort_keys=True) for value in target["per_layer_config"].values()}
    assert {json.dumps(value, sort_keys=True) for value in text["per_layer_config"].values()} == wide
    assert read(builtin.pairs()[name], "generation_config.json")["num_assistant_tokens"] == 4


@pytest.mark.parametrize("name", GEMMA)
def test_shapes_suit_every_engine(name: str) -> None:
    config = read(name)
    assert config["head_dim"] in (32, 64)
    assert {value["head_dim"] for value in config["per_layer_config"].values()} <= {64, 128}
    assert config["sliding_window"] <= 128
    assert config["final_logit_softcapping"] == 30.0
    assert config["vocab_size"] % 128 == 0


def test_each_gemma_pair_shows_its_own_features() -> None:
    e2b, dense, experts = (read(name) for name in GEMMA)
    assert e2b["hidden_size_per_layer_input"]
    assert e2b["num_kv_shared_layers"]
    assert e2b["use_double_wide_mlp"]
    assert read("tiny-e2b-assistant")["use_ordered_embeddings"] is True
    assert dense["attention_k_eq_v"]
    assert not dense["enable_moe_block"]
    assert experts["enable_moe_block"]
    assert experts["num_experts"] > experts["top_k_experts"] > 0
    for name in ("tiny-31b-assistant", "tiny-26b-assistant"):
        assert read(name)["use_ordered_embeddings"] is False


def test_prompts_are_texts_and_chats() -> None:
    found = builtin.prompts()
    assert len(found) >= 24
    assert len({prompt.id for prompt in found}) == len(found)
    assert {prompt.kind for prompt in found} == {"text", "chat"}
    assert any(prompt.enable_thinking for prompt in found)
    assert any(prompt.tools for prompt in found)
    for prompt in found:
        assert bool(prompt.text) == (prompt.kind == "text")
        assert bool(prompt.messages) == (prompt.kind == "chat")


def test_prompts_come_from_held_out_modules() -> None:
    from training.sources import HELD_OUT

    assert {prompt.source for prompt in builtin.prompts()} <= set(HELD_OUT)
