"""Prompts and models that a backend cannot know."""

import json
import shutil
from pathlib import Path

from polydraft_conformance.changed_checkpoints import change_tensors
from polydraft_conformance.pairs import Pair
from polydraft_conformance.prompts import chats, texts
from polydraft_conformance.varied import chosen, vary

PAIR = Pair("builtin:one", (("mtp", "builtin:one-assistant"), ("ngram", "ngram")), 16)


def test_no_eight_characters_are_in_all_runs():
    def pieces(seed):
        return {text[at : at + 8] for text in (*texts(seed), *chats(seed)) for at in range(len(text) - 7)}

    assert set.intersection(*(pieces(seed) for seed in range(30))) == set()


def test_texts_repeat_with_the_seed_and_are_long_enough():
    for seed in range(30):
        code, prose, _ = texts(seed)
        assert (code, prose) == texts(seed)[:2]
        assert len(code) > 1500
        assert prose[0].isupper() and not code[0].isupper()  # noqa: PT018
        assert len(chats(seed)) >= 8
    assert chats(1) != chats(2)


def folder(path, weights):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"seed": 80} if weights is None else {}))
    if weights is not None:
        head = json.dumps({}).encode()
        (path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
        change_tensors(path, lambda tensors: tensors.update(weights))
    return path


def varied(source, workspace, seed=1, *, quick=True):
    if workspace.exists():
        shutil.rmtree(workspace)
    workspace.mkdir()
    return vary(PAIR, lambda _: source, seed, workspace, quick=quick)


def test_a_varied_copy_has_other_norms_only(tmp_path):
    one = b"\x80\x3f"  # 1.0 in bfloat16
    weights = {"model.norm.weight": ("BF16", [64], 64 * one), "model.up.weight": ("BF16", [4, 16], 64 * one)}
    source = folder(tmp_path / "source", weights)
    pair = varied(source, tmp_path / "copies")
    assert pair.name == "varied-one"
    assert pair.case(4).drafter_name == "varied builtin:one-assistant"
    found = {}
    change_tensors(Path(pair.target), found.update)
    assert found["model.up.weight"] == weights["model.up.weight"]
    assert found["model.norm.weight"][:2] == ("BF16", [64])
    assert found["model.norm.weight"] != weights["model.norm.weight"]
    first = (Path(pair.target) / "model.safetensors").read_bytes()
    again = varied(source, tmp_path / "copies")
    assert (Path(again.target) / "model.safetensors").read_bytes() == first
    other = varied(source, tmp_path / "copies", seed=2)
    assert (Path(other.target) / "model.safetensors").read_bytes() != first


def test_a_varied_copy_of_weights_made_from_a_seed(tmp_path):
    pair = varied(folder(tmp_path / "source", None), tmp_path / "copies", quick=False)
    seeds = {json.loads((Path(model) / "config.json").read_text())["seed"] for _, model in pair.drafters[:1]}
    assert 80 not in seeds
    assert pair.drafters[1] == ("ngram", "ngram")


def test_what_cannot_be_varied_has_no_copy(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    assert varied(source, tmp_path / "copies") is None
    assert vary(PAIR, lambda _: None, 1, tmp_path, quick=True) is None


def test_a_quick_run_varies_one_pair_that_the_seed_draws():
    pairs = [Pair(f"builtin:{name}", PAIR.drafters, 16) for name in ("one", "two", "three")]
    assert chosen(pairs, 1, quick=False) == tuple(pairs)
    assert {chosen(pairs, seed, quick=True) for seed in range(40)} == {(pair,) for pair in pairs}
    assert chosen((), 1, quick=True) == ()
