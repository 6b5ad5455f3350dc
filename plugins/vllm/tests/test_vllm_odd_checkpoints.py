"""Unusual checkpoints mean here what they mean in every engine; vLLM itself is not started for it."""

import json
import shutil

import pytest
from polydraft._load import prepare
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft_conformance.odd_checkpoints import ODD_CHECKPOINTS, check_meaning, make_checkpoint
from polydraft_vllm.settings import sampling_values
from polydraft_vllm.tokenizer import load_tokenizer

pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")


@pytest.mark.parametrize("backend", ["vllm", "vllm-server"])
@pytest.mark.parametrize("case", ODD_CHECKPOINTS, ids=lambda case: case.name)
def test_an_odd_checkpoint(case, backend, tmp_path):
    folder = make_checkpoint(case, pairs.path("tiny-llama"), tmp_path / case.name)
    tokenizer = load_tokenizer(folder, prepare(folder, backend=backend, drafter=None).request)
    check_meaning(case, tokenizer)
    request = TokenRequest(
        prompt_token_ids=(1,),
        settings=GenerationSettings(),
        seed=0,
        speculate=False,
        num_speculative_tokens=0,
        eos_token_ids=tokenizer.eos_token_ids,
        max_total_tokens=64,
    )
    sent = sampling_values(request)[1]
    assert (sent["ignore_eos"], set(sent["stop_token_ids"])) == (True, tokenizer.eos_token_ids)


@pytest.mark.parametrize("rows", [2304, 1024])
def test_a_model_has_more_or_fewer_tokens_than_its_tokenizer(rows, tmp_path):
    """Ids run as far as the embedding does: vocabularies are padded, and beyond its rows a GPU's engine crashes."""
    folder = tmp_path / "model"
    shutil.copytree(pairs.path("tiny-llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    request = prepare(pairs.path("tiny-llama"), backend="vllm", drafter=None).request
    target = request.target.model_copy(update={"config": {**request.target.config, "vocab_size": rows}})
    assert load_tokenizer(folder, request.model_copy(update={"target": target})).vocab_size == rows
