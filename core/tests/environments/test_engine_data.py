"""The registry's data of engines: whole, and of the versions that the plugins support."""

import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from polydraft._registry.backends import known_backends
from polydraft._registry.engines import engine_of, known_engines, pinned_versions

ROOT = Path(__file__).parents[3]
ENGINES = list(known_engines().values())
LINUX, ARM = ("linux", "x86_64"), ("linux", "aarch64")
MAC, OLD_MAC, WINDOWS = ("darwin", "arm64"), ("darwin", "x86_64"), ("win32", "AMD64")
EXPECTED = {
    "transformers": {LINUX: "cuda cpu", ARM: "cuda cpu", MAC: "metal", OLD_MAC: "", WINDOWS: "cpu"},
    "reference": dict.fromkeys((LINUX, ARM, MAC, OLD_MAC, WINDOWS), "cpu"),
    "vllm": {LINUX: "cuda cpu", ARM: "cuda cpu", MAC: "", OLD_MAC: "", WINDOWS: ""},
    "llama_cpp": {LINUX: "cuda cpu", ARM: "cuda cpu", MAC: "metal cpu", OLD_MAC: "cpu", WINDOWS: "cpu"},
    "xllamacpp": {LINUX: "cpu", ARM: "cpu", MAC: "metal cpu", OLD_MAC: "cpu", WINDOWS: "cpu"},
    "ollama": dict.fromkeys((LINUX, ARM, MAC, OLD_MAC, WINDOWS), "cpu"),
    "litert_lm": {LINUX: "cpu", ARM: "cpu", MAC: "cpu", OLD_MAC: "", WINDOWS: "cpu"},
    "mlx": {LINUX: "cuda cpu", ARM: "cuda cpu", MAC: "metal", OLD_MAC: "", WINDOWS: ""},
}


def project(engine):
    return tomllib.loads((ROOT / engine.folder / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_where_each_engine_has_packages(engine):
    found = {}
    for platform, machine in EXPECTED[engine.name]:
        here = {"sys_platform": platform, "platform_machine": machine}
        fitting = [one.accelerator for one in engine.variants if not one.needs or Marker(one.needs).evaluate(here)]
        found[platform, machine] = " ".join(fitting)
    assert found == EXPECTED[engine.name]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_each_engine_is_the_plugin_of_its_folder(engine):
    found = project(engine)
    assert found["name"] == engine.distribution
    assert engine.name in found["entry-points"]["polydraft"]
    assert set(engine.self_test) <= set(engine.backends)
    for backend in engine.backends:
        assert engine_of(backend) is engine
        assert any(known.name == backend and known.install for known in known_backends())


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_the_pinned_versions_are_those_that_the_plugin_supports(engine):
    tested, found = pinned_versions(engine.tested), project(engine)
    extras = found.get("optional-dependencies", {}).values()
    for text in [*found["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        version = tested.get(canonicalize_name(requirement.name))
        assert version is None or version in requirement.specifier, text


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_every_step_does_one_thing_in_a_tested_version(engine):
    tested = pinned_versions(engine.tested)
    for variant in engine.variants:
        assert sum(step.plugin for step in variant.all_steps()) == 1
        for step in variant.all_steps():
            assert sum(map(bool, (step.install, step.compile, step.remove, step.plugin))) == 1
            for requirement in (*step.install, *step.compile):
                assert canonicalize_name(Requirement(requirement).name) in tested
            assert not step.index or step.build
