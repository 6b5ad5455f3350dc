"""Unusual checkpoints mean here what they mean in every engine."""

import polydraft
import pytest
from polydraft_conformance.odd_checkpoints import ODD_CHECKPOINTS, check_meaning, make_checkpoint

pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")


@pytest.mark.parametrize("case", ODD_CHECKPOINTS, ids=lambda case: case.name)
def test_an_odd_checkpoint(case, tmp_path):
    folder = make_checkpoint(case, pairs.path("tiny-llama"), tmp_path / case.name)
    with polydraft.load(folder, backend="transformers", drafter=None, device="cpu") as session:
        check_meaning(case, session.tokenizer)
        if case.chat.endswith("model\n"):
            result = session.generate([{"role": "user", "content": "Hi"}], max_new_tokens=64)
            assert result.finish_reason == "eos"
