"""mlx-lm's own loop, as ``polydraft bench --against upstream`` runs it: the same tokens, in rounds."""

import json
import shutil

import mlx.core as mx
import polydraft
import pytest
from polydraft._load import prepare
from polydraft._plugins import default_host
from polydraft_mlx import backend
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


@pytest.mark.parametrize("target", [TARGET, "builtin:tiny-e2b"])
def test_rounds_are_split_though_mlx_chooses_in_its_steps(target):
    given = {"prompts": ["import os\n"], "max_new_tokens": 6, "repeats": 1, "num_speculative_tokens": 2}
    found = polydraft.bench(target, backend="mlx", host=default_host(), **given)
    plain, drafted = (row.round_ms for row in found.rows)
    assert min(plain.verify, plain.choose, plain.host) > 0
    assert min(drafted.draft, drafted.verify, drafted.choose, drafted.host) > 0
    assert sum((drafted.draft, drafted.verify, drafted.choose, drafted.host)) == pytest.approx(drafted.total)


def test_mlx_lm_has_none_for_assistants_and_ngrams(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)  # without mlx-vlm
    for target, drafter in (("builtin:tiny-e2b", "auto"), (TARGET, "ngram")):
        assert MlxBackend().upstream(prepare(target, backend="mlx", drafter=drafter).request) is None


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """The pair tiny-e2b in mlx-vlm's own format, with a vision tower of random weights."""
    gemma4 = pytest.importorskip("mlx_vlm.models.gemma4", reason="mlx-vlm is not installed: `nox -s peers` does that")
    from mlx.utils import tree_flatten
    from polydraft_builtin_pairs import path
    from polydraft_mlx.config import text_overrides
    from polydraft_mlx.vlm_upstream import _text_alone

    request = prepare("builtin:tiny-e2b", backend="mlx").request
    folder = shutil.copytree(path("tiny-e2b"), tmp_path_factory.mktemp("vlm") / "model")
    model = _text_alone(folder, request.target)
    text = json.loads((folder / "config.json").read_text())
    text |= text_overrides(text, "tiny-e2b")
    vision = {
        **{name: value for name, value in vars(model.config.vision_config).items() if value is not None},
        "model_type": "gemma4_vision",
    }
    config = {"model_type": "gemma4", "text_config": text, "vision_config": vision, "vocab_size": text["vocab_size"]}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": text["hidden_size"]}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    assert gemma4
    return folder


@pytest.mark.parametrize("checkpoint", ["text", "multimodal"])
def test_mlx_vlm_s_tokens_are_ours_and_come_in_rounds(checkpoint, request):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: `nox -s peers` does that")
    target = "builtin:tiny-e2b" if checkpoint == "text" else request.getfixturevalue("multimodal")
    arguments = {"backend": "mlx", "drafter": "builtin:tiny-e2b-assistant", "dtype": "float32"}
    found = MlxBackend().upstream(prepare(target, **arguments).request)
    assert found.name == "generate_step(draft_kind='mtp')"
    with polydraft.load(target, **arguments, num_speculative_tokens=3, isolation="none") as session:
        ours = session.generate("import os\nimport sys\nimport os\n", max_new_tokens=24, ignore_eos=True)
        call = found.open(session.engine)
        for k in (3, 0):
            rounds = []
            call(ours.prompt_token_ids, k, 24, frozenset(), rounds.append)
            assert tuple(token for new in rounds for token in new) == ours.token_ids
            assert max(map(len, rounds)) <= k + 1
            assert (len(rounds) < len(ours.token_ids)) == (k > 0)
        rounds = []
        call(ours.prompt_token_ids, 3, 24, frozenset({ours.token_ids[5]}), rounds.append)
        ended = [token for new in rounds for token in new]
        assert ended == list(ours.token_ids[: ours.token_ids.index(ours.token_ids[5]) + 1])
