"""mlx-lm's own loop, as ``polydraft bench --against upstream`` runs it: the same tokens, in rounds."""

import polydraft
import pytest
from polydraft._load import prepare
from polydraft_mlx.backend import MlxBackend

pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

TARGET = "builtin:tiny-llama"


def test_the_tokens_are_ours_and_come_in_rounds():
    found = MlxBackend().upstream(prepare(TARGET, backend="mlx").request)
    assert found.name == "stream_generate(draft_model=)"
    with polydraft.load(TARGET, backend="mlx", dtype="float32", num_speculative_tokens=3, isolation="none") as session:
        ours = session.generate("import os\nimport sys\nimport os\n", max_new_tokens=16)
        call = found.open(session.engine)
        for k in (3, 0):
            rounds = []
            call(ours.prompt_token_ids, k, 16, session.tokenizer.eos_token_ids, rounds.append)
            assert tuple(token for new in rounds for token in new) == ours.token_ids
            assert max(map(len, rounds)) <= k + 1
            assert (len(rounds) < len(ours.token_ids)) == (k > 0)


def test_mlx_lm_has_none_for_assistants_and_ngrams():
    for target, drafter in (("builtin:tiny-e2b", "auto"), (TARGET, "ngram")):
        assert MlxBackend().upstream(prepare(target, backend="mlx", drafter=drafter).request) is None
