"""Unusual checkpoints mean here what they mean in every engine."""

import json
from dataclasses import replace

import polydraft
import pytest
from polydraft.checkpoints.gguf import read_header
from polydraft.checkpoints.special_tokens import GGUF_KEY, gguf_special_tokens, read_special_tokens
from polydraft_conformance.odd_checkpoints import ODD_CHECKPOINTS, check_meaning, make_checkpoint
from polydraft_gguf.conversion.write import convert
from polydraft_llama_cpp.model import Model
from polydraft_llama_cpp.tokenizer import GgufTokenizer

pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")


@pytest.mark.parametrize("case", ODD_CHECKPOINTS, ids=lambda case: case.name)
def test_an_odd_checkpoint(case, tmp_path):
    folder = make_checkpoint(case, pairs.path("tiny-llama"), tmp_path / case.name)
    with polydraft.load(folder, backend="llama_cpp", drafter=None, device="cpu") as session:
        check_meaning(case, session.tokenizer)
        if case.chat.endswith("model\n"):
            result = session.generate([{"role": "user", "content": "Hi"}], max_new_tokens=64)
            assert result.finish_reason == "eos"


@pytest.fixture(scope="module")
def published(gguf):
    """A function: the tokenizer of a file as other programs write it, with these keys in its header."""
    file = gguf("tiny-llama")
    model = Model(file, "tiny-llama", vocab_only=True)

    def tokenizer(**keys):
        header = read_header(file)
        metadata = {key: value for key, value in header.metadata.items() if key != GGUF_KEY and "_token" not in key}
        metadata.update({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
        return GgufTokenizer(model, gguf_special_tokens(replace(header, metadata=metadata)))

    yield tokenizer
    model.free()


def test_files_of_other_programs(published):
    # One end is all that llama.cpp's own converter writes.
    usual = published(bos_token_id=2, eos_token_id=1, add_bos_token=True)
    assert (usual.bos_token_id, usual.eos_token_ids) == (2, {1, 5, 13})
    hi = [{"role": "user", "content": "Hi"}]
    assert usual.chat(hi)[0] == 2
    # The chat template writes BOS: the model knows it, whatever the flag says.
    assert published(bos_token_id=2, add_bos_token=False).bos_token_id == 2
    # llama.cpp itself would take token 11 as BOS and EOS.
    unnamed = published()
    assert (unnamed.bos_token_id, unnamed.eos_token_ids, unnamed.chat(hi)) == (None, {5, 13}, usual.chat(hi)[1:])


def test_all_that_a_folder_says_is_in_the_file(tmp_path):
    for case in ODD_CHECKPOINTS:
        folder = make_checkpoint(case, pairs.path("tiny-llama"), tmp_path / case.name)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "response_template": {"a": [1]}}))
        convert(folder, tmp_path / "model.gguf")
        config = json.loads((folder / "config.json").read_text())
        said, written = read_special_tokens(folder, config), gguf_special_tokens(read_header(tmp_path / "model.gguf"))
        assert written.chat_templates == said.chat_templates
        assert written.names == said.names
        assert written.response_template == said.response_template == {"a": [1]}
        assert written.eos_token_ids >= said.eos_token_ids
