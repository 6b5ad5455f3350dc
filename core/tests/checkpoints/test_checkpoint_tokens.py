"""Two tokenizers are the same if they give the same ids to the same text; the sentence names a token that differs."""

import copy
import json

import pytest
from polydraft.checkpoints._tokens import check_tokens, first_difference
from polydraft.errors import ModelFormatError, PairMismatchError

BPE = {
    "added_tokens": [{"id": 4, "content": "<eos>"}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3}, "merges": [["a", "b"], ["b", "a"]]},
}
UNIGRAM = {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}


def changed(base, edit):
    other = copy.deepcopy(base)
    edit(other)
    return other


@pytest.mark.parametrize(
    ("base", "edit", "said"),
    [
        (BPE, lambda t: t["model"]["vocab"].update(ab=3, ba=2), "token 'ab' has id 2 in T and 3 in D"),
        (BPE, lambda t: t["model"]["vocab"].pop("ba"), "token 'ba' (id 3) of T is unknown to D"),
        (BPE, lambda t: t["model"]["vocab"].update(zz=9), "token 'zz' (id 9) of D is unknown to T"),
        (BPE, lambda t: t["added_tokens"][0].update(content="<end>"), "token '<eos>' (id 4) of T is unknown to D"),
        (BPE, lambda t: t["added_tokens"][0].update(id=5), "token '<eos>' has id 4 in T and 5 in D"),
        (BPE, lambda t: t["model"]["merges"].reverse(), "merge rule 0 ('a b') is not the same"),
        (BPE, lambda t: t["model"]["merges"].pop(), "merge rule 1 ('b a') is not the same"),
        (BPE, lambda t: t["model"].update(type="WordPiece"), "T has a BPE tokenizer, D a WordPiece one"),
        (UNIGRAM, lambda t: t["model"]["vocab"][1].__setitem__(1, -3.0), "scores of their tokens differ"),
        (UNIGRAM, lambda t: t["model"]["vocab"].reverse(), "token 'a' has id 0 in T and 1 in D"),
    ],
)
def test_differences(base, edit, said):
    assert said in first_difference(base, changed(base, edit), names=("T", "D"))


@pytest.mark.parametrize("base", [BPE, UNIGRAM])
def test_one_may_have_further_added_tokens(base):
    """The other has no token of that id, so nothing contradicts it."""
    further = changed(base, lambda t: t["added_tokens"].append({"id": 9, "content": "<tool>"}))
    assert first_difference(base, further) == first_difference(further, base) == ""
    taken = changed(base, lambda t: t["added_tokens"].append({"id": 9, "content": "<call>"}))
    assert "'<tool>' (id 9) of the target is unknown" in first_difference(further, taken)
    moved = changed(base, lambda t: t["added_tokens"].append({"id": 8, "content": "<tool>"}))
    assert "'<tool>' has id 9 in the target and 8" in first_difference(further, moved)


@pytest.mark.parametrize("base", [BPE, UNIGRAM])
def test_equal(base):
    assert first_difference(base, copy.deepcopy(base)) == ""


def test_both_ways_to_write_merges_are_equal():
    assert first_difference(BPE, changed(BPE, lambda t: t["model"].update(merges=["a b", "b a"]))) == ""


def test_files(make_model):
    target = make_model("t", {}, tokenizer=BPE) / "tokenizer.json"
    check_tokens(target, make_model("d", {}, tokenizer=BPE) / "tokenizer.json")
    # Equal sizes prove nothing: all have five tokens.
    edits = {
        "token 'ab'": lambda t: t["model"]["vocab"].update(ab=3, ba=2),
        "token 'ba'": lambda t: (t["model"]["vocab"].pop("ba"), t["model"]["vocab"].update(bb=3)),
    }
    for index, (said, edit) in enumerate(edits.items()):
        other = make_model(f"o{index}", {}, tokenizer=changed(BPE, edit)) / "tokenizer.json"
        with pytest.raises(PairMismatchError, match=said) as error:
            check_tokens(target, other, names=("my-target", "my-drafter"))
        assert "my-drafter" in error.value.message
        assert "ngram" in error.value.hint


@pytest.mark.parametrize("content", ["{", "{}", "[]", json.dumps({"model": {"vocab": [1]}})])
def test_broken_file(make_model, content):
    target, drafter = make_model("t", {}, tokenizer=BPE), make_model("d", {}, tokenizer=BPE)
    (drafter / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFormatError, match=r"not a tokenizer\.json"):
        check_tokens(target / "tokenizer.json", drafter / "tokenizer.json")
