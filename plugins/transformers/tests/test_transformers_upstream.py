"""Transformers' own loop, as ``polydraft bench --against upstream`` runs it: the same tokens, in rounds."""

import polydraft
import pytest
from polydraft_transformers.backend import TransformersBackend

pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")


@pytest.mark.parametrize(
    ("target", "drafter", "name"),
    [
        ("builtin:tiny-e2b", "auto", "generate(assistant_model=)"),
        ("builtin:tiny-llama", "auto", "generate(assistant_model=)"),
        ("builtin:tiny-llama", "ngram", "generate(prompt_lookup_num_tokens=)"),
    ],
)
def test_the_tokens_are_ours_and_come_in_rounds(target, drafter, name):
    from polydraft._load import prepare

    found = TransformersBackend().upstream(prepare(target, backend="transformers", drafter=drafter).request)
    assert found.name == name
    with polydraft.load(
        target, backend="transformers", drafter=drafter, dtype="float32", num_speculative_tokens=3, isolation="none"
    ) as session:
        ours = session.generate("import os\nimport sys\nimport os\n", max_new_tokens=16)
        call = found.open(session.engine)
        for k in (3, 0):
            rounds = []
            call(ours.prompt_token_ids, k, 16, session.tokenizer.eos_token_ids, rounds.append)
            assert tuple(token for new in rounds for token in new) == ours.token_ids
            assert max(map(len, rounds)) <= k + 1
            assert (len(rounds) < len(ours.token_ids)) == (k > 0)
