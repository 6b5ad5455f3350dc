"""``load(verified=...)``: what was verified counts for just that, and for nothing else."""

import json
import shutil
import warnings

import polydraft
import pytest
from defects import Unverified
from polydraft.contract import LocalModelRecord, hookimpl
from polydraft.errors import InvalidRequestError, NotVerifiedError
from polydraft.verification import _subject as subject
from polydraft.verification._command import verify as verify_for_long
from polydraft.verification._gate import VerificationWarning
from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.toys import MODELS

TOY = {"backend": "reference"}


def verify(target, **options):
    """For a second: here it matters what is kept, not how much was compared."""
    return verify_for_long(target, time_limit=1, **options)


def require(target="builtin:toy", **options):
    with polydraft.load(target, verified="require", **{**TOY, **options}) as session:
        return session.running.verified


@pytest.fixture
def not_loaded(monkeypatch):
    """Fails where anything is loaded: what is refused is refused before."""
    monkeypatch.setattr(ReferenceEngine, "__init__", lambda *_: pytest.fail("it was loaded"))


def test_what_was_verified_is_loaded_and_the_session_says_so():
    kept = verify("builtin:toy", **TOY)
    told = require()
    assert (told.verdict, told.created, told.num_tokens) == ("EXACT", kept.created, kept.num_tokens)


def test_what_was_not_is_refused_before_it_is_loaded(not_loaded):
    with pytest.raises(NotVerifiedError, match="has not been verified here") as raised:
        require(num_speculative_tokens=3, drafter="builtin:toy-draft", engine_options={"agreement": 0.5})
    assert raised.value.hint == (
        "Run: polydraft verify --model builtin:toy --backend reference --drafter builtin:toy-draft -k 3 "
        "--engine-option agreement=0.5"
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_speculative_tokens": 3}, "k was 4, is 3"),
        ({"drafter": "builtin:toy-draft"}, "drafter was builtin:toy-assistant, is builtin:toy-draft"),
        ({"drafter": "ngram"}, "the drafter kind was mtp, is ngram"),
        ({"exactness": "bitwise"}, "exactness was standard, is bitwise"),
        ({"engine_options": {"agreement": 0.9}}, "the engine's options"),
    ],
)
def test_another_request_is_not_what_was_verified(changes, why, monkeypatch):
    verify("builtin:toy", **TOY)
    monkeypatch.setattr(ReferenceEngine, "__init__", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(NotVerifiedError, match="not as it would run now") as raised:
        require(**changes)
    assert why in raised.value.message


def test_another_dtype_is_found_out_once_it_is_loaded():
    verify("builtin:toy", dtype="float64", **TOY)
    assert require(dtype="float64").verdict == "EXACT"
    with pytest.raises(NotVerifiedError, match="dtype was float64, is float32"):
        require(dtype="auto")


def test_a_failure_in_another_dtype_is_not_this_one_s(broken):
    verify("builtin:toy", dtype="float32", **TOY)
    broken(Unverified)
    assert verify("builtin:toy", dtype="float64", **TOY).verdict == "DIVERGED"
    assert require(dtype="float32").verdict == "EXACT"
    with pytest.raises(NotVerifiedError, match="found DIVERGED"):
        require(dtype="float64")


def test_another_version_of_the_engine_is_another_subject(monkeypatch):
    verify("builtin:toy", **TOY)
    known = subject.installed_version
    monkeypatch.setattr(subject, "installed_version", lambda name: "9.9" if name == "numpy" else known(name))
    with pytest.raises(NotVerifiedError, match=r"numpy was \S+, is 9\.9"):
        require()


def test_other_hardware_is_another_subject(monkeypatch):
    verify("builtin:toy", **TOY)
    monkeypatch.setattr(subject, "_hardware", lambda _: "abacus")
    with pytest.raises(NotVerifiedError, match=r"hardware was .*, is abacus"):
        require()


@pytest.mark.parametrize("model", ["target", "drafter"])
def test_changed_weights_are_another_subject(monkeypatch, tmp_path, model):
    folders = {"target": tmp_path / "toy", "drafter": tmp_path / "toy-draft"}
    for folder in folders.values():
        shutil.copytree(MODELS / folder.name, folder)
    host = polydraft.PluginHost({"toys": _Plugin(tmp_path)})
    asked = {"host": host, "drafter": "builtin:mine-draft"}
    verify("builtin:mine", **TOY, **asked)
    assert require("builtin:mine", **asked).verdict == "EXACT"
    config = folders[model] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "seed": 99}))
    with pytest.raises(NotVerifiedError, match=f"the {model}'s files have changed"):
        require("builtin:mine", **asked)


class _Plugin:
    """The reference backend with models in another folder."""

    def __init__(self, folder):
        self.folder = folder

    @hookimpl
    def polydraft_backends(self):
        from polydraft_reference import plugin

        return plugin.polydraft_backends()

    @hookimpl
    def polydraft_local_models(self):
        for name, folder in (("mine", "toy"), ("mine-draft", "toy-draft")):
            yield LocalModelRecord(name=name, path=str(self.folder / folder), format="reference")


def test_what_failed_is_refused_and_not_recommended_again(broken):
    broken(Unverified)
    verify("builtin:toy", **TOY)
    with pytest.raises(NotVerifiedError, match="found DIVERGED") as raised:
        require()
    assert "drafter=None" in raised.value.hint


def test_a_new_verification_replaces_the_old_one(broken, data_home, monkeypatch):
    sound = ReferenceEngine.sequence_class
    broken(Unverified)
    verify("builtin:toy", **TOY)
    broken(sound)
    verify("builtin:toy", **TOY)
    assert len(list(data_home.glob("*.json"))) == 1
    assert require().verdict == "EXACT"


def test_damaged_and_foreign_files_are_as_if_they_were_not_there(data_home):
    verify("builtin:toy", **TOY)
    (path,) = data_home.glob("*.json")
    kept = json.loads(path.read_text())
    for text in ("", "{", json.dumps({**kept, "format": 99}), json.dumps({**kept, "more": 1})):
        path.write_text(text)
        with pytest.raises(NotVerifiedError, match="has not been verified"):
            require()


def test_warn_warns_and_loads_and_says_it():
    with pytest.warns(VerificationWarning, match="polydraft verify --model builtin:toy --backend reference") as warned:
        session = polydraft.load("builtin:toy", verified="warn", **TOY)
    assert warned[0].filename == __file__
    with session:
        assert session.running.verified is None
        assert any(note.startswith("Not verified:") for note in session.running.notes)
        assert session.generate("Hi", max_new_tokens=2).running == session.running
    verify("builtin:toy", **TOY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with polydraft.load("builtin:toy", verified="warn", **TOY) as session:
            assert session.running.verified.verdict == "EXACT"


def test_off_asks_nothing_and_plain_decoding_needs_nothing(data_home):
    with polydraft.load("builtin:toy", **TOY) as session:
        assert session.running.verified is None
        assert session.running.notes == ()
    assert require(drafter=None) is None
    assert not data_home.exists()


def test_another_word_is_refused_before_anything():
    with pytest.raises(InvalidRequestError, match="verified='maybe'"):
        polydraft.load("builtin:no-such-model", verified="maybe")


def test_what_is_not_kept_is_not_there(data_home):
    verify("builtin:toy", keep=False, **TOY)
    assert not data_home.exists()
