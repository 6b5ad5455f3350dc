"""Which drafter a session gets: by the caller, the registry, a sibling, the config, n-grams, or none and why."""

import json

import pytest
from litertlm_writer import SECTIONS, litertlm
from polydraft._plugins import PluginHost
from polydraft._registry.drafters import DrafterChoice
from polydraft._registry.faults import FaultRegistry, core_faults
from polydraft._registry.pairs import PairRegistry, RegisteredPair
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.contract import BackendRecord, FaultRecord, LocalModelRecord, PairRecord
from polydraft.contract.requests import HubOptions, ModelSource
from polydraft.errors import (
    BackendUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    PairMismatchError,
    SpeculationUnavailableError,
)

pytestmark = pytest.mark.usefixtures("clean_environment")

BACKEND = BackendRecord(
    name="transformers",
    factory="a:b",
    summary="",
    formats={"safetensors"},
    drafter_kinds={"mtp", "draft-model", "ngram"},
    engine="transformers",
    install_hint="x",
)
CORE = PairRegistry.of(PluginHost({}))


def backend(**changes):
    return BACKEND.model_copy(update={name: frozenset(value) for name, value in changes.items()})


def registry(*pairs):
    return PairRegistry([RegisteredPair(pair=pair, origin="plugin", source="test") for pair in pairs])


@pytest.fixture
def plan(builtin_data):
    """``DrafterChoice.plan`` with the trained pairs as built-in models and nothing else around."""
    names = sorted(path.name for path in builtin_data.iterdir())
    models = {name: LocalModelRecord(name=name, path=str(builtin_data / name)) for name in names}
    known = KnownNames(local_models=models)

    def make(target, drafter="auto", *, record=BACKEND, pairs=CORE, faults=None, versions=None, **options):
        lookup = {"transformers": "5.22.2", **(versions or {})}.get
        choice = DrafterChoice(
            target=target if isinstance(target, ModelSource) else resolve(target, known=known),
            backend=record,
            registry=pairs,
            faults=FaultRegistry(core_faults() if faults is None else faults, lookup),
            resolve=lambda name: resolve(name, known=known, role="drafter"),
            **options,
        )
        return choice.plan(drafter)

    return make


@pytest.fixture
def copy(tmp_path, builtin_data):
    """Copy a trained model to a folder of another name."""
    import shutil

    def make(name, to):
        return shutil.copytree(builtin_data / name, tmp_path / "models" / to)

    return make


# --- what the caller says --------------------------------------------------------------------------------------------
def test_none(plan):
    found = plan("builtin:tiny-e2b", None)
    assert (found.kind, found.drafter, found.num_speculative_tokens) == (None, None, 0)
    assert found.off.code == "caller"


def test_ngram(plan):
    found = plan("builtin:tiny-e2b", "ngram")
    assert (found.kind, found.drafter, found.num_speculative_tokens, found.chosen_by) == ("ngram", None, 4, "caller")
    with pytest.raises(SpeculationUnavailableError, match="n-gram") as error:
        plan("builtin:tiny-e2b", "ngram", record=backend(drafter_kinds=["mtp"]))
    assert "mtp" in error.value.hint


def test_given_drafters(plan):
    found = plan("builtin:tiny-e2b", "builtin:tiny-e2b-assistant")
    assert (found.kind, found.drafter.id, found.chosen_by) == ("mtp", "builtin:tiny-e2b-assistant", "caller")
    found = plan("builtin:tiny-31b", "builtin:tiny-e2b")
    assert (found.kind, found.drafter.id) == ("draft-model", "builtin:tiny-e2b")


def test_given_drafter_by_path(plan, builtin_data):
    found = plan("builtin:tiny-e2b", builtin_data / "tiny-e2b-assistant")
    assert found.drafter.path == builtin_data / "tiny-e2b-assistant"


@pytest.mark.parametrize(
    ("target", "drafter", "error"),
    [
        ("builtin:tiny-e2b", "builtin:tiny-31b-assistant", PairMismatchError),
        ("builtin:tiny-llama", "builtin:tiny-e2b-assistant", PairMismatchError),
        ("builtin:tiny-e2b-assistant", "builtin:tiny-e2b", PairMismatchError),
        ("builtin:tiny-e2b", "builtin:tiny-e2b-asistant", ModelNotFoundError),
        ("builtin:tiny-e2b", "no/such-model", ModelNotFoundError),
    ],
)
def test_given_drafters_that_do_not_do(plan, target, drafter, error):
    with pytest.raises(error) as caught:
        plan(target, drafter)
    assert caught.value.hint


def test_given_drafter_of_a_kind_the_backend_has_not(plan):
    with pytest.raises(SpeculationUnavailableError, match="no drafters of kind mtp"):
        plan("builtin:tiny-e2b", "builtin:tiny-e2b-assistant", record=backend(drafter_kinds=["ngram"]))


def test_a_reason_is_told_once(plan):
    """The draft model of the registry also lies next to its target."""
    pair = PairRecord(target="builtin:tiny-llama", drafter="builtin:tiny-llama-draft", kind="draft-model")
    found = plan("builtin:tiny-llama", record=backend(drafter_kinds=["mtp"]), pairs=registry(pair))
    assert found.note.count("no drafters of kind draft-model") == 1


def test_given_drafter_of_another_format(plan, tmp_path, gguf_bytes):
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({"general.architecture": "llama"}))
    with pytest.raises(SpeculationUnavailableError, match="format is gguf"):
        plan("builtin:tiny-e2b", str(tmp_path / "x.gguf"))


def test_given_drafter_and_a_fault(plan):
    with pytest.raises(BackendUnavailableError, match=r"transformers 5\.23\.0 has a known fault") as error:
        plan("builtin:tiny-e2b", "builtin:tiny-e2b-assistant", versions={"transformers": "5.23.0"})
    assert "!=5.23.0" in error.value.hint
    assert plan("builtin:tiny-31b", "builtin:tiny-e2b", versions={"transformers": "5.23.0"}).kind == "draft-model"


def test_kind_from_the_registry_counts_for_given_drafters(plan, make_model):
    """An EAGLE-3 head whose config does not say that it is one."""
    head = make_model("head", {"model_type": "llama"})
    pairs = registry(PairRecord(target="builtin:tiny-llama", drafter=str(head), kind="eagle3"))
    with pytest.raises(SpeculationUnavailableError, match="kind eagle3"):
        plan("builtin:tiny-llama", str(head), pairs=pairs)


# --- k ---------------------------------------------------------------------------------------------------------------
def test_k(plan):
    pairs = registry(
        PairRecord(
            target="builtin:tiny-e2b",
            drafter="builtin:tiny-e2b-assistant",
            kind="mtp",
            num_speculative_tokens={"transformers": 6, "*": 2},
        )
    )
    assert plan("builtin:tiny-e2b", pairs=pairs).num_speculative_tokens == 6
    assert plan("builtin:tiny-e2b", pairs=pairs, num_speculative_tokens=3).num_speculative_tokens == 3
    other = BACKEND.model_copy(update={"name": "other"})
    assert plan("builtin:tiny-e2b", pairs=pairs, record=other).num_speculative_tokens == 2
    given = plan("builtin:tiny-e2b", "builtin:tiny-e2b-assistant", pairs=pairs)
    assert given.num_speculative_tokens == 6, "the recommendation is the pair's, whoever chose it"
    limited = plan("builtin:tiny-e2b", pairs=pairs, max_speculative_tokens=5)
    assert limited.num_speculative_tokens == 5
    assert "6 is recommended" in limited.note
    with pytest.raises(InvalidRequestError, match="at most 5"):
        plan("builtin:tiny-e2b", pairs=pairs, num_speculative_tokens=6, max_speculative_tokens=5)


def test_k_that_is_picked_for_each_round(plan):
    """Room for twice the recommendation; with bitwise steps, which all cost as much as the largest, for no more."""

    def largest(**options):
        found = plan("builtin:tiny-e2b", num_speculative_tokens="auto", **options)
        return found.num_speculative_tokens, found.max_speculative_tokens, found.max_draft_tokens

    pairs = registry(
        PairRecord(
            target="builtin:tiny-e2b",
            drafter="builtin:tiny-e2b-assistant",
            kind="mtp",
            num_speculative_tokens={"*": 3},
        )
    )
    assert largest(pairs=pairs) == (3, 6, 6)
    assert largest(pairs=pairs, max_speculative_tokens=5) == (3, 5, 5)
    assert largest(pairs=pairs, max_speculative_tokens=2) == (2, 2, 2)
    assert largest(pairs=pairs, exactness="bitwise") == (3, 3, 3)
    fixed = plan("builtin:tiny-e2b", pairs=pairs, num_speculative_tokens=3)
    assert (fixed.max_speculative_tokens, fixed.max_draft_tokens) == (None, 3)


# --- auto ------------------------------------------------------------------------------------------------------------
def test_registry_comes_first(plan):
    pairs = registry(PairRecord(target="builtin:tiny-31b", drafter="builtin:tiny-e2b", kind="draft-model", note="Odd."))
    found = plan("builtin:tiny-31b", pairs=pairs)
    assert (found.drafter.id, found.chosen_by, found.note) == ("builtin:tiny-e2b", "registry", "Odd.")


def test_first_kind_that_the_backend_runs(plan):
    pairs = registry(
        PairRecord(target="builtin:tiny-31b", drafter="builtin:tiny-31b-assistant", kind="mtp"),
        PairRecord(target="builtin:tiny-31b", drafter="builtin:tiny-e2b", kind="draft-model"),
    )
    assert plan("builtin:tiny-31b", pairs=pairs).kind == "mtp"
    assert plan("builtin:tiny-31b", pairs=pairs, record=backend(drafter_kinds=["draft-model"])).kind == "draft-model"


def test_registry_may_say_ngram(plan):
    pairs = registry(PairRecord(target="builtin:tiny-31b", drafter=None, kind="ngram", num_speculative_tokens={"*": 8}))
    found = plan("builtin:tiny-31b", pairs=pairs)
    assert (found.kind, found.chosen_by, found.num_speculative_tokens) == ("ngram", "registry", 8)


@pytest.mark.parametrize(
    ("target", "drafter", "kind"),
    [
        ("builtin:tiny-e2b", "builtin:tiny-e2b-assistant", "mtp"),
        ("builtin:tiny-llama", "builtin:tiny-llama-draft", "draft-model"),
    ],
)
def test_builtin_siblings(plan, target, drafter, kind):
    found = plan(target)
    assert (found.drafter.id, found.kind, found.chosen_by) == (drafter, kind, "sibling")


def test_sibling_folders(plan, copy):
    target = copy("tiny-e2b", "mine")
    copy("tiny-e2b-assistant", "mine-assistant")
    found = plan(target)
    assert (found.drafter.path, found.kind, found.chosen_by) == (target.with_name("mine-assistant"), "mtp", "sibling")


def test_sibling_of_the_working_folder(plan, copy, monkeypatch):
    monkeypatch.chdir(copy("tiny-e2b", "mine"))
    copy("tiny-e2b-assistant", "mine-assistant")
    assert plan("./").drafter.path.name == "mine-assistant"


def test_draft_sibling(plan, copy):
    target = copy("tiny-31b", "mine")
    copy("tiny-e2b", "mine-draft")
    assert plan(target).kind == "draft-model"


def test_sibling_that_does_not_fit(plan, copy):
    target = copy("tiny-e2b", "mine")
    copy("tiny-31b-assistant", "mine-assistant")
    found = plan(target)
    assert (found.kind, found.chosen_by) == ("ngram", "fallback")
    assert "hidden size 192, this one has 160" in found.note


def test_damaged_sibling(plan, copy):
    target = copy("tiny-e2b", "mine")
    (copy("tiny-e2b-assistant", "mine-assistant") / "model.safetensors").write_bytes(b"x")
    found = plan(target)
    assert found.kind == "ngram"
    assert "cut short" in found.note


def test_fitting_sibling_of_another_name(plan, copy):
    target = copy("tiny-e2b", "mine")
    copy("tiny-e2b-assistant", "drafter")
    copy("tiny-31b-assistant", "other")
    found = plan(target)
    assert (found.drafter.path.name, found.chosen_by) == ("drafter", "config")
    assert "found next to the target" in found.note


def test_two_fitting_siblings_are_one_too_many(plan, copy):
    target = copy("tiny-e2b", "mine")
    copy("tiny-e2b-assistant", "one")
    copy("tiny-e2b-assistant", "two")
    found = plan(target)
    assert found.kind == "ngram"
    assert "2 assistants here fit (one, two)" in found.note


def test_a_drafter_that_another_target_claims_is_left_alone(plan, copy):
    """Of equal shape, but trained for the other one: it would hardly ever be accepted."""
    target = copy("tiny-e2b", "mine")
    copy("tiny-e2b", "theirs")
    copy("tiny-e2b-assistant", "theirs-assistant")
    assert plan(target).kind == "ngram"


def test_ngram_says_why(plan, copy):
    found = plan(copy("tiny-e2b", "mine"))
    assert (found.kind, found.drafter, found.off) == ("ngram", None, None)
    assert "n-gram" in found.note
    assert "No drafter is known" in found.note


def test_off_says_why(plan, copy):
    found = plan(copy("tiny-e2b", "mine"), record=backend(drafter_kinds=["mtp"]))
    assert (found.kind, found.num_speculative_tokens, found.off.code) == (None, 0, "no-drafter")
    assert found.off.message


def test_fault_leaves_ngram_or_nothing(plan):
    versions = {"transformers": "5.23.0"}
    found = plan("builtin:tiny-e2b", versions=versions)
    assert found.kind == "ngram"
    assert "5.23.0" in found.note
    assert "!=5.23.0" in found.note
    found = plan("builtin:tiny-e2b", versions=versions, record=backend(drafter_kinds=["mtp"]))
    assert found.off.code == "fault"
    assert "5.23.0" in found.off.message


def test_warnings_are_in_the_note(plan):
    warn = FaultRecord(
        id="w",
        distribution="transformers",
        versions=">=5",
        affects="mtp",
        severity="warn",
        summary="It is slow.",
        remedy="Wait.",
    )
    assert "It is slow. Wait." in plan("builtin:tiny-e2b", faults=[warn]).note
    assert "slow" not in plan("builtin:tiny-e2b", "ngram", faults=[warn]).note


def test_engine_older_than_the_pair_needs(plan, copy):
    target = copy("tiny-e2b", "mine")
    pair = PairRecord(
        target=str(target),
        drafter="builtin:tiny-e2b-assistant",
        kind="mtp",
        min_versions={"transformers": "6.0", "another-engine": "99"},
    )
    found = plan(target, pairs=registry(pair))
    assert found.kind == "ngram"
    assert "it needs transformers>=6.0, 5.22.2 is installed" in found.note
    assert plan(target, pairs=registry(pair), versions={"transformers": "6.0"}).kind == "mtp"


# --- by name, on the Hub ---------------------------------------------------------------------------------------------
@pytest.fixture
def on_hub(fake_hub, builtin_data):
    target = json.loads((builtin_data / "tiny-e2b/config.json").read_text())
    assistant = json.loads((builtin_data / "tiny-e2b-assistant/config.json").read_text())
    for name in ("google/gemma-4-E4B-it", "me/gemma-4-E4B-it-AWQ", "me/own"):
        fake_hub.add(name, {"config.json": target})
    fake_hub.add("google/gemma-4-E4B-it-assistant", {"config.json": assistant})
    return fake_hub


def test_hub_target(plan, on_hub):
    found = plan("google/gemma-4-E4B-it")
    assert (found.drafter.id, found.drafter.kind, found.chosen_by) == (
        "google/gemma-4-E4B-it-assistant",
        "hub",
        "registry",
    )
    assert {path.rpartition("/")[2] for _, path in on_hub.requests} == {"config.json"}, "no weights are fetched"


def test_quantized_variant_on_the_hub(plan, on_hub):
    found = plan("me/gemma-4-E4B-it-AWQ")
    assert found.drafter.id == "google/gemma-4-E4B-it-assistant"
    assert "another packing of google/gemma-4-E4B-it" in found.note


def test_unlisted_hub_target(plan, on_hub):
    assert plan("me/own").kind == "ngram"


def test_local_copy_of_a_listed_target(plan, on_hub, copy):
    found = plan(copy("tiny-e2b", "gemma-4-e4b-it"))
    assert (found.drafter.id, found.chosen_by) == ("google/gemma-4-E4B-it-assistant", "config")
    assert "by its name" in found.note


def test_hub_cache_folder(plan, on_hub, copy):
    found = plan(copy("tiny-e2b", "models--google--gemma-4-E4B-it/snapshots/0123"))
    assert found.drafter.id == "google/gemma-4-E4B-it-assistant"


def test_config_that_names_its_origin(plan, on_hub, copy):
    folder = copy("tiny-e2b", "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "google/gemma-4-E4B-it"}))
    assert plan(folder).drafter.id == "google/gemma-4-E4B-it-assistant"


def test_a_name_alone_is_not_believed(plan, on_hub, copy):
    """A folder with a listed name, but of another shape."""
    found = plan(copy("tiny-31b", "gemma-4-E4B-it"))
    assert found.kind == "ngram"
    assert "hidden size" in found.note


def test_drafter_that_cannot_be_reached(plan, on_hub):
    on_hub.fail("google/gemma-4-E4B-it-assistant", 403, "GatedRepo")
    found = plan("google/gemma-4-E4B-it")
    assert found.kind == "ngram"
    assert "gated" in found.note
    with pytest.raises(ModelNotFoundError, match="gated"):
        plan("google/gemma-4-E4B-it", "google/gemma-4-E4B-it-assistant")


def test_gguf(plan, fake_hub, tmp_path):
    fake_hub.add("unsloth/gemma-4-E4B-it-GGUF", {"gemma-4-E4B-it-Q4_K_M.gguf": b"GGUF"})
    gguf = backend(formats=["gguf"])
    known = KnownNames(formats=CORE.formats())
    target = resolve("unsloth/gemma-4-E4B-it-GGUF:Q4_K_M", known=known)
    choice = DrafterChoice(
        target=target,
        backend=gguf,
        registry=CORE,
        faults=FaultRegistry([]),
        resolve=lambda name: resolve(name, known=known, role="drafter"),
    )
    found = choice.plan()
    assert (found.drafter.id, found.drafter.file) == ("unsloth/gemma-4-E4B-it-GGUF", "MTP/mtp-gemma-4-E4B-it-BF16.gguf")


def test_gguf_files_beside_one_another(plan, tmp_path, gguf_bytes):
    (tmp_path / "MTP").mkdir()
    for name in (
        "gemma-4-E4B-it-Q4_K_M.gguf",
        "MTP/mtp-gemma-4-E4B-it-Q8_0.gguf",
        "MTP/mtp-gemma-4-E4B-it-BF16.gguf",
        "MTP/mtp-gemma-4-31B-it-BF16.gguf",
    ):
        architecture = "gemma4-assistant" if "mtp-" in name else "gemma4"
        (tmp_path / name).write_bytes(gguf_bytes({"general.architecture": architecture}))
    found = plan(tmp_path / "gemma-4-E4B-it-Q4_K_M.gguf", record=backend(formats=["gguf"]))
    assert found.drafter.path == tmp_path / "MTP/mtp-gemma-4-E4B-it-BF16.gguf"
    assert (found.kind, found.chosen_by) == ("mtp", "sibling")


def test_a_split_target_and_its_drafter(plan, tmp_path, gguf_bytes):
    for name in ("x-BF16-00001-of-00002.gguf", "x-BF16-00002-of-00002.gguf", "mtp-x-Q8_0.gguf", "mtp-y-BF16.gguf"):
        architecture = "gemma4-assistant" if "mtp-" in name else "gemma4"
        (tmp_path / name).write_bytes(gguf_bytes({"general.architecture": architecture}))
    found = plan(tmp_path / "x-BF16-00001-of-00002.gguf", record=backend(formats=["gguf"]))
    assert found.drafter.path == tmp_path / "mtp-x-Q8_0.gguf"


@pytest.mark.parametrize(
    ("files", "drafter"),
    [
        (["MTP/mtp-x-Q8_0.gguf", "MTP/mtp-x-BF16.gguf"], "MTP/mtp-x-BF16.gguf"),
        (["mtp-x.gguf"], "mtp-x.gguf"),
        (["mtp-x.gguf", "mtp-y.gguf"], None),
        ([], None),
    ],
)
def test_gguf_files_in_a_repository_that_is_not_registered(fake_hub, files, drafter):
    fake_hub.add("me/my-x-GGUF", dict.fromkeys(["x-Q4_K_M.gguf", *files], b"GGUF"))
    known = KnownNames()
    choice = DrafterChoice(
        target=resolve("me/my-x-GGUF@main:Q4_K_M", known=known),
        backend=backend(formats=["gguf"]),
        registry=CORE,
        faults=FaultRegistry([]),
        resolve=lambda name: resolve(name, known=known, role="drafter"),
        hub=HubOptions(),
    )
    found = choice.plan()
    if drafter is None:
        assert found.kind == "ngram"
    else:
        assert (found.kind, found.drafter.file, found.drafter.revision) == ("mtp", drafter, "main")


def test_drafter_inside_the_file(plan, fake_hub):
    target = ModelSource(id="litert-community/gemma-4-E2B-it-litert-lm", kind="hub", format="litertlm")
    found = plan(target, record=backend(formats=["litertlm"]))
    assert (found.kind, found.drafter, found.chosen_by) == ("mtp", None, "registry")


def test_a_drafter_inside_a_local_file_fixes_k(tmp_path):
    (tmp_path / "m.litertlm").write_bytes(litertlm())
    (tmp_path / "plain.litertlm").write_bytes(litertlm(SECTIONS[:2]))
    runs = backend(formats=["litertlm"], drafter_kinds=["mtp"])

    def choice(name, k=None):
        return DrafterChoice(
            target=resolve(tmp_path / name, known=KnownNames()),
            backend=runs,
            registry=CORE,
            faults=FaultRegistry([]),
            resolve=lambda name: resolve(name, known=KnownNames(), role="drafter"),
            num_speculative_tokens=k,
        ).plan()

    for k in (None, 4):
        found = choice("m.litertlm", k)
        assert (found.kind, found.drafter, found.chosen_by, found.num_speculative_tokens) == ("mtp", None, "config", 4)
    with pytest.raises(InvalidRequestError, match="always drafts 4 tokens"):
        choice("m.litertlm", 3)
    assert choice("plain.litertlm").off.code == "no-drafter"
