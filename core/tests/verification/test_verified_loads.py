"""``load(verified=...)``: what was verified counts for just that, and for nothing else."""

import base64
import hashlib
import itertools
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import polydraft
import pytest
from polydraft._load import prepare
from polydraft._sealed import write_sealed
from polydraft.contract import LocalModelRecord, hookimpl
from polydraft.errors import (
    EngineError,
    InvalidRequestError,
    NotVerifiedError,
    PolydraftError,
    SpeculationUnavailableError,
)
from polydraft.verification import _builds, _run
from polydraft.verification import _subject as subject
from polydraft.verification._builds import builds_here, builds_in, code_digest, distribution_builds
from polydraft.verification._command import verify
from polydraft.verification._gate import VerificationWarning
from polydraft.verification._records import CheckedCase
from polydraft.verification._store import find, save
from polydraft.verification._verdict import Judgement
from polydraft_reference.backend import ReferenceBackend
from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.toys import MODELS

TOY = {"backend": "reference"}


def keep(found, target="builtin:toy", dtype="float32", **options):
    """Keep ``found`` as what a verification of this would have found."""
    prepared = prepare(target, dtype=dtype, **{**TOY, **options})
    loaded = {"dtype": dtype, "device": "cpu"}
    of = subject.subject_of(prepared, options.get("host") or polydraft._plugins.default_host())
    return save(found.model_copy(update={"subject": of.model_copy(update=loaded)}))


def require(target="builtin:toy", **options):
    with polydraft.load(target, verified="require", **{**TOY, **options}) as session:
        return session.running.verified


@pytest.fixture(scope="module")
def found():
    """What is found on the toy pair, not kept."""
    return verify("builtin:toy", keep=False, time_limit=3, **TOY)


@pytest.fixture(scope="module")
def diverged(found):
    """The same with a defect."""
    defect = Judgement(verdict="DIVERGED", position=1, tokens=(1, 2), reason="They are far apart.")
    return found.model_copy(
        update={"cases": tuple(case.model_copy(update={"judgement": defect}) for case in found.cases)}
    )


@pytest.fixture
def not_loaded(monkeypatch):
    """Fails where anything is loaded: what is refused is refused before."""
    monkeypatch.setattr(ReferenceEngine, "__init__", lambda *_: pytest.fail("it was loaded"))


def test_what_was_verified_is_loaded_and_the_session_says_so():
    kept = verify("builtin:toy", time_limit=3, **TOY)
    told = require()
    assert (told.verdict, told.created, told.num_tokens) == ("EXACT", kept.created, kept.num_tokens)


def test_what_was_not_is_refused_before_it_is_loaded(not_loaded):
    with pytest.raises(NotVerifiedError, match="has not been verified here") as raised:
        require(num_speculative_tokens=3, drafter="builtin:toy-assistant", engine_options={"agreement": 0.5})
    assert raised.value.hint == (
        "Run: polydraft verify --model builtin:toy --backend reference --drafter builtin:toy-assistant -k 3 "
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
def test_another_request_is_not_what_was_verified(found, changes, why, monkeypatch):
    keep(found)
    monkeypatch.setattr(ReferenceEngine, "__init__", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(NotVerifiedError, match="not as it would run now") as raised:
        require(**changes)
    assert why in raised.value.message


def test_another_dtype_is_found_out_once_it_is_loaded(found):
    keep(found, dtype="float64")
    assert require(dtype="float64").verdict == "EXACT"
    with pytest.raises(NotVerifiedError, match="dtype was float64, is float32"):
        require(dtype="auto")


def test_a_failure_in_another_dtype_is_not_this_one_s(found, diverged):
    keep(found)
    keep(diverged, dtype="float64")
    assert require(dtype="float32").verdict == "EXACT"
    with pytest.raises(NotVerifiedError, match="found DIVERGED"):
        require(dtype="float64")


def test_another_version_of_the_engine_is_another_subject(found, monkeypatch):
    keep(found)
    known = _builds.installed_version
    monkeypatch.setattr(_builds, "installed_version", lambda name: "9.9" if name == "numpy" else known(name))
    with pytest.raises(NotVerifiedError, match=r"numpy was \S+, is 9\.9"):
        require()


def test_an_environment_tells_of_itself(tmp_path):
    """What another interpreter has installed is not what this one has."""
    names, packages = ["numpy", "no-such-distribution"], ["polydraft"]
    here = builds_here(names, packages)
    assert here[0].keys() == {"numpy"}
    assert builds_in(Path(sys.executable), names, packages)[1]["numpy"] == here[1]["numpy"]
    with pytest.raises(EngineError, match="does not tell what is installed"):
        builds_in(tmp_path / "python", names, packages)


def test_other_hardware_is_another_subject(found, monkeypatch):
    keep(found)
    monkeypatch.setattr(subject, "_hardware", lambda _: "abacus")
    with pytest.raises(NotVerifiedError, match=r"hardware was .*, is abacus"):
        require()


@pytest.mark.parametrize("model", ["target", "drafter"])
def test_changed_weights_are_another_subject(found, tmp_path, model):
    folders = {"target": tmp_path / "toy", "drafter": tmp_path / "toy-draft"}
    for folder in folders.values():
        shutil.copytree(MODELS / folder.name, folder)
    host = polydraft.PluginHost({"toys": _Plugin(tmp_path)})
    asked = {"host": host, "drafter": "builtin:mine-draft"}
    keep(found, "builtin:mine", **asked)
    assert require("builtin:mine", **asked).verdict == "EXACT"
    config = folders[model] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "seed": 99}))
    with pytest.raises(NotVerifiedError, match=f"the {model}'s files have changed"):
        require("builtin:mine", **asked)


def test_files_that_change_while_they_are_loaded_are_noticed(found, tmp_path, monkeypatch):
    shutil.copytree(MODELS / "toy", tmp_path / "toy")
    shutil.copytree(MODELS / "toy-draft", tmp_path / "toy-draft")
    asked = {"host": polydraft.PluginHost({"toys": _Plugin(tmp_path)}), "drafter": "ngram"}
    keep(found, "builtin:mine", **asked)
    load_engine = ReferenceBackend.load_engine

    def replaced_meanwhile(self, request):
        (tmp_path / "toy/generation_config.json").write_text("{}")
        return load_engine(self, request)

    monkeypatch.setattr(ReferenceBackend, "load_engine", replaced_meanwhile)
    with pytest.raises(NotVerifiedError, match="the target's files have changed"):
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


def test_what_failed_is_refused_and_not_recommended_again(diverged):
    keep(diverged)
    with pytest.raises(NotVerifiedError, match="found DIVERGED") as raised:
        require()
    assert "drafter=None" in raised.value.hint


def test_a_new_verification_replaces_the_old_one(found, diverged, data_home):
    keep(diverged)
    keep(found)
    assert len(list(data_home.glob("*.json"))) == 1
    assert require().verdict == "EXACT"


def edits(kept):
    """Contents of a record's file that do not count: damaged, or edited by hand."""
    record = kept["record"]
    yield ""
    yield "{"
    yield json.dumps({**kept, "more": 1})
    yield json.dumps(record)
    for changed in ({"format": 99}, {"seconds": 0.5}, {"subject": {**record["subject"], "num_speculative_tokens": 3}}):
        yield json.dumps({**kept, "record": {**record, **changed}})


def test_damaged_and_edited_files_are_as_if_they_were_not_there(found, tmp_path):
    path = keep(found)
    kept = json.loads(path.read_text())
    for text in edits(kept):
        path.write_text(text)
        for k in (3, 4):
            with pytest.raises(NotVerifiedError, match="has not been verified"):
                require(num_speculative_tokens=k)
    path.write_text(json.dumps(kept))  # the seal is of the data: its layout does not matter
    assert require().verdict == "EXACT"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(NotVerifiedError, match="has not been verified"):
        require()


NEARLY = {"verdict": "NEAR_TIE", "position": 1, "tokens": [1, 2], "reason": "."}
TIE = {"source": "logits", "values": [1.0, 1.0], "margin": 0.1, "noise": 0.01, "control": [2]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cases": []}, "has not been verified"),
        ({"num_tokens": 0}, "compared no token"),
        ({"num_tokens": 1}, "compared no token"),  # the prefill's
        ({"num_tokens": -5}, "has not been verified"),
        ({"draft_tokens": 0}, "compared no token"),
        ({"judgement": {"verdict": "EXACT", "position": 1, "tokens": [1, 2]}}, "has not been verified"),
        ({"judgement": {**NEARLY, "tie": None}}, "has not been verified"),
        ({"judgement": {**NEARLY, "tie": TIE}}, "has not been verified"),  # ten times the noise apart
        ({"judgement": {**NEARLY, "tie": {**TIE, "margin": 0.01, "control": []}}}, "has not been verified"),
        ({"judgement": {**NEARLY, "tie": {**TIE, "margin": 0.01}}}, None),
        ({"judgement": {**NEARLY, "position": 10**6, "tie": {**TIE, "margin": 0.01}}}, "has not been verified"),
    ],
)
def test_a_record_counts_by_its_evidence(found, changes, said):
    """Sealed ones too: as a program with another rule, or a fault, would write them."""
    path = keep(found)
    record = json.loads(path.read_text())["record"]
    if changes == {"draft_tokens": 0}:
        record["stats"]["num_draft_tokens"] = 0
    else:
        record["cases"] = changes.get("cases", [{**case, **changes} for case in record["cases"]])
    write_sealed(path, record)
    if said is None:
        assert require().verdict == "NEAR_TIE"
    else:
        with pytest.raises(NotVerifiedError, match=said):
            require()


def test_a_record_of_another_model_does_not_count_under_this_one_s_name(found):
    shutil.copy(keep(found, num_speculative_tokens=3), keep(found))
    with pytest.raises(NotVerifiedError, match="k was 3, is 4"):
        require()


def test_outputs_of_one_token_verify_nothing(monkeypatch, data_home):
    """As of a server that ends every answer at once, whatever it is asked for."""
    monkeypatch.setattr(_run, "CheckedCase", lambda **case: CheckedCase(**{**case, "num_tokens": 1}))
    with pytest.raises(SpeculationUnavailableError, match="nothing could be verified"):
        verify("builtin:toy", time_limit=3, **TOY)
    assert not list(data_home.glob("*"))


def test_the_spelling_of_a_model_does_not_matter(found, tmp_path, monkeypatch):
    host = polydraft.PluginHost({"toys": _Plugin(tmp_path)})
    shutil.copytree(MODELS / "toy", tmp_path / "toy")
    shutil.copytree(MODELS / "toy-draft", tmp_path / "toy-draft")
    asked = {"host": host, "drafter": "ngram"}
    keep(found, tmp_path / "toy", **asked)
    (tmp_path / "link").symlink_to("toy")
    monkeypatch.chdir(tmp_path)
    for name in ("./toy", "./toy/", "toy-draft/../toy", "./link", "builtin:mine", str(tmp_path / "toy")):
        assert require(name, **asked).verdict == "EXACT"
    (tmp_path / "toy/new.py").write_text("")
    with pytest.raises(NotVerifiedError, match="the target's files have changed"):
        require("./toy/", **asked)


@pytest.mark.parametrize("what", ["engine", "numpy", "polydraft's code", "trust"])
def test_another_build_is_another_subject(monkeypatch, found, what):
    keep(found)
    assert require().verdict == "EXACT"
    if what == "engine":
        monkeypatch.setattr(ReferenceBackend, "build", lambda *_: {"library": "another"})
    elif what == "numpy":
        known = _builds.distribution_builds
        monkeypatch.setattr(_builds, "distribution_builds", lambda names: {**known(names), "numpy": "compiled here"})
    elif what == "polydraft's code":
        monkeypatch.setattr(_builds, "code_digest", lambda package: f"edited {package}")
    said = {"engine": "another build of library", "numpy": "another build of numpy", "trust": "trust_remote_code was"}
    with pytest.raises(NotVerifiedError, match=said.get(what, "another build of the code of polydraft")):
        require(trust_remote_code=what == "trust")


def test_what_was_started_elsewhere_is_never_verified(monkeypatch, found, data_home):
    keep(found)
    monkeypatch.setattr(ReferenceBackend, "build", lambda *_: None)
    with pytest.raises(PolydraftError, match="cannot be identified from here"):
        verify("builtin:toy", **TOY)
    assert found.passes
    with pytest.raises(NotVerifiedError, match="cannot be identified from here") as raised:
        require()
    assert "polydraft verify" not in raised.value.hint


def test_files_that_change_meanwhile_are_not_verified(data_home, monkeypatch):
    monkeypatch.setattr(subject, "fingerprint", lambda *_: f"bytes {next(counted)}")
    counted = itertools.count()
    with pytest.raises(PolydraftError, match="changed while they were verified"):
        verify("builtin:toy", time_limit=3, **TOY)
    assert not list(data_home.glob("*"))


def test_the_code_of_a_package_is_its_files(tmp_path, monkeypatch):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/__init__.py").write_text("a = 1")
    (tmp_path / "single.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digest("packed"), code_digest("single")
    (tmp_path / "packed/more.py").write_text("")
    (tmp_path / "single.py").write_text("a = 2")
    assert not {code_digest("packed"), code_digest("single")} & set(before)
    assert code_digest("no_such_package") == ""


def test_the_build_of_a_distribution_is_its_code(tmp_path, monkeypatch):
    def install(root, code="a = 1"):
        info = root / "some_engine-1.0.dist-info"
        info.mkdir(parents=True)
        (root / "some_engine.py").write_text(code)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-engine\nVersion: 1.0\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(code.encode()).digest()).rstrip(b"=").decode()
        lines = [f"some_engine.py,sha256={digest},5", "../../bin/tool,sha256=x,5", f"{info.name}/RECORD,,"]
        (info / "RECORD").write_text("\n".join(lines))
        return root

    def build(root):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(root)
            return distribution_builds(["some-engine", "no-such-distribution"])

    monkeypatch.setattr(_builds, "_SLACK", 0)
    first = build(install(tmp_path / "one"))
    assert list(first) == ["some-engine"]
    assert build(install(tmp_path / "elsewhere")) == first
    assert build(install(tmp_path / "other", "a = 2")) != first
    file = tmp_path / "one/some_engine.py"
    before = file.stat()
    file.write_text("a = 3")  # in place, with size and time kept
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    edited = build(tmp_path / "one")
    assert edited != first
    file.unlink()
    assert build(tmp_path / "one") not in (first, edited)


def test_a_hub_model_that_is_not_downloaded_is_known_by_its_commit_until_it_is(found):
    hub = found.subject.model_copy(update={"target": "org/m", "target_commit": "c1"})
    kept = found.model_copy(update={"subject": hub})
    save(kept)
    missing = {"target_fingerprint": ""}
    assert find(hub.model_copy(update=missing)).verification == kept
    assert find(hub.model_copy(update={**missing, "target_commit": ""})).verification == kept  # not in the cache at all
    assert find(hub.model_copy(update={**missing, "target_commit": "c2"})).why_not.endswith(
        "the target's commit was c1, is c2."
    )
    assert "has not been verified" in find(hub.model_copy(update={**missing, "target": "org/other"})).why_not
    assert "not on this machine" in find(hub.model_copy(update=missing), loaded=True).why_not
    assert find(hub.model_copy(update={"target_commit": "c2"}), loaded=True).verification == kept  # the same bytes


def test_warn_warns_and_loads_and_says_it(found):
    with pytest.warns(VerificationWarning, match="polydraft verify --model builtin:toy --backend reference") as warned:
        session = polydraft.load("builtin:toy", verified="warn", **TOY)
    assert warned[0].filename == __file__
    with session:
        assert session.running.verified is None
        assert any(note.startswith("Not verified:") for note in session.running.notes)
        assert session.generate("Hi", max_new_tokens=2).running == session.running
    keep(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with polydraft.load("builtin:toy", verified="warn", **TOY) as session:
            assert session.running.verified.verdict == "EXACT"


def test_off_asks_nothing_and_plain_decoding_needs_nothing(data_home):
    with polydraft.load("builtin:toy", **TOY) as session:
        assert session.running.verified is None
        assert session.running.notes == ()
    assert require(drafter=None) is None
    assert not list(data_home.glob("*"))


def test_another_word_is_refused_before_anything():
    with pytest.raises(InvalidRequestError, match="verified='maybe'"):
        polydraft.load("builtin:no-such-model", verified="maybe")


def test_what_is_not_kept_is_not_there(data_home):
    verify("builtin:toy", keep=False, time_limit=2, **TOY)
    assert not data_home.exists()
