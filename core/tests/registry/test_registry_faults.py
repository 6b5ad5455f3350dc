"""Known faults are matched by distribution, version, use and architecture."""

import pytest
from packaging.specifiers import SpecifierSet
from polydraft._plugins import PluginHost
from polydraft._registry.faults import FaultRegistry, core_faults
from polydraft._registry.versions import in_range, installed_alternative, installed_version, older_than
from polydraft.contract import BackendRecord, FaultRecord, hookimpl


@pytest.fixture
def faults():
    return FaultRegistry(core_faults(), lambda name: None)


def ids(found):
    return [fault.id for fault in found]


def test_core_list_is_well_formed():
    assert len({fault.id for fault in core_faults()}) == len(core_faults())
    for fault in core_faults():
        assert SpecifierSet(fault.versions)
        assert fault.summary.endswith((".", ")."))
        assert fault.remedy
        assert not fault.link or fault.link.startswith("https://github.com/")


@pytest.mark.parametrize(("version", "faulty"), [("5.22.2", False), ("5.23.0", True), ("5.23.1", False)])
def test_transformers_5_23_0(faults, version, faulty):
    found = faults.faults_for("transformers", version, affects=["mtp"], model_types=["gemma4_text", "gemma4_assistant"])
    assert bool(found) is faulty
    if faulty:
        assert found[0].severity == "refuse"
        assert "!=5.23.0" in found[0].remedy


def test_only_what_is_used_counts(faults):
    assert not faults.faults_for("transformers", "5.23.0", affects=["ngram"])
    assert not faults.faults_for("transformers", "5.23.0", affects=["mtp"], model_types=["llama"])
    assert ids(faults.faults_for("transformers", "5.23.0")) == ["transformers-5-23-0-gemma4-assistant"]


@pytest.fixture
def sampling_fault():
    return FaultRecord(
        id="engine-cpu-sampling",
        distribution="engine-cpu",
        versions=">=0.32,<0.34",
        affects="sampling",
        architectures=("gemma4",),
        severity="warn",
        summary="It samples wrongly.",
        remedy="Nothing.",
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.32.0+cpu", "0.33.0rc1"])
def test_spellings_of_names_and_versions(sampling_fault, version):
    faults = FaultRegistry([sampling_fault], lambda name: None)
    assert faults.faults_for("ENGINE_cpu", version, affects=["sampling", "mtp"], model_types=["gemma4"])
    assert not faults.faults_for("engine-cpu", version, affects=["sampling"], model_types=["llama"])


def test_of_a_backend_with_alternatives(sampling_fault):
    record = BackendRecord(
        name="v",
        factory="a:b",
        summary="",
        formats={"safetensors"},
        drafter_kinds={"mtp"},
        engine="engine",
        requires={"engine|engine-cpu": ">=0.32"},
        install_hint="x",
    )
    registry = FaultRegistry([sampling_fault], {"engine-cpu": "0.32.0"}.get)
    found = registry.faults_of(record, affects=["sampling"])
    assert [(fault.id, version) for fault, version in found] == [("engine-cpu-sampling", "0.32.0")]
    assert FaultRegistry([sampling_fault], lambda name: None).faults_of(record) == []


def test_a_plugin_may_correct_the_core():
    corrected = core_faults()[0].model_copy(update={"versions": "==5.23.0,!=5.23.0"})

    class Plugin:
        @hookimpl
        def polydraft_faults(self):
            yield corrected
            yield FaultRecord(
                id="mine", distribution="d", versions="<2", affects="all", severity="warn", summary="s.", remedy="r"
            )

    registry = FaultRegistry.of(PluginHost({"p": Plugin}))
    assert not registry.faults_for("transformers", "5.23.0")
    assert ids(registry.faults_for("d", "1.0", affects=["mtp"])) == ["mine"], "all counts for every use"


def test_versions():
    assert in_range("5.23.0.dev0", ">=5.17")
    assert not in_range("5.16", ">=5.17")
    assert older_than("5.9", "5.17")
    assert installed_version("numpy")
    assert installed_version("no-such-distribution") is None
    assert installed_alternative("no-such|numpy", {"numpy": "2"}.get) == ("numpy", "2")
    assert installed_alternative("a|b", lambda name: None) is None
    assert not in_range("not a version", ">=1")
    assert not older_than("not a version", "1")
    with pytest.raises(ValueError, match="latest"):
        in_range("1", "latest")
