"""The guide for plugin authors covers the whole contract, and its code is real."""

import inspect
import re
from pathlib import Path

import pytest
from polydraft.contract import (
    PUBLIC_MODULES,
    Backend,
    BackendRecord,
    CacheRecord,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    EngineSequence,
    Exclusion,
    FaultRecord,
    Generation,
    GenerationSettings,
    LoadRequest,
    LocalModelRecord,
    ModelSource,
    PairRecord,
    PolydraftSpec,
    Round,
    RunningInfo,
    Sampler,
    SpeculationPlan,
    SteppingEngine,
    Tokenizer,
    TokenLogprobs,
    TokenRequest,
    WholeEngine,
)

ROOT = Path(__file__).parents[3]
GUIDE = ROOT / "docs/plugin-guide.md"
EXAMPLE = ROOT / "examples/third_party_plugin"

pytestmark = pytest.mark.skipif(not GUIDE.is_file(), reason="the guide is in the repository, not in the distribution")

HOOK_RECORDS = {
    "polydraft_backends": BackendRecord,
    "polydraft_pairs": PairRecord,
    "polydraft_faults": FaultRecord,
    "polydraft_local_models": LocalModelRecord,
    "polydraft_caches": CacheRecord,
}
FIELDS = (
    *(Capabilities, Diagnosis, DeviceRecord, Exclusion, GenerationSettings, LoadRequest, ModelSource, Round),
    *(RunningInfo, SpeculationPlan, TokenLogprobs, TokenRequest),
)
INTERFACES = (Backend, SteppingEngine, EngineSequence, Sampler, Tokenizer, WholeEngine, Generation)
BLOCK = re.compile(r"(?:<!-- (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```\n", re.DOTALL)


def guide():
    return GUIDE.read_text(encoding="utf-8")


def section(title):
    """The text under the first heading that starts with ``title``."""
    match = re.search(rf"^(#+) {re.escape(title)}.*?$(.*?)(?=^#{{1,3}} |\Z)", guide(), re.DOTALL | re.MULTILINE)
    assert match, f"the guide has no section {title!r}"
    return match[2]


def public_members():
    for interface in INTERFACES:
        for name, member in {**dict.fromkeys(interface.__annotations__), **vars(interface)}.items():
            if not name.startswith("_"):
                yield pytest.param(name, member, id=f"{interface.__name__}.{name}")


def written(name, function):
    """A method as the guide writes it: without self and annotations."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]
    return f"`{name}{inspect.Signature(parameters)}`"


def test_the_hooks_are_those_of_the_spec():
    hooks = {name for name in vars(PolydraftSpec) if name.startswith("polydraft_")}
    assert hooks == set(HOOK_RECORDS)


@pytest.mark.parametrize("hook", HOOK_RECORDS)
def test_every_hook_its_arguments_and_its_fields_are_in_the_guide(hook):
    heading = written(hook, getattr(PolydraftSpec, hook))
    text = section(heading)
    assert f"`{HOOK_RECORDS[hook].__name__}`" in text
    missing = [name for name in HOOK_RECORDS[hook].model_fields if f"`{name}`" not in text]
    assert not missing


@pytest.mark.parametrize(("name", "member"), list(public_members()))
def test_every_method_and_its_arguments_are_in_the_guide(name, member):
    wanted = written(name, member) if inspect.isfunction(member) else f"`{name}`"
    assert wanted in guide()


@pytest.mark.parametrize("record", FIELDS)
def test_every_field_that_a_plugin_reads_or_writes_is_in_the_guide(record):
    missing = [name for name in record.model_fields if f"`{name}`" not in guide()]
    assert not missing


def test_the_public_modules_are_in_the_guide():
    text = section("10. What you may import")
    assert set(re.findall(r"`(polydraft[\w.]*)`(?=[^\n]*\|)", text)) == set(PUBLIC_MODULES)


def test_the_code_of_the_guide_is_the_code_of_the_example():
    blocks = [match for match in BLOCK.finditer(guide()) if match["file"]]
    assert {match["file"] for match in blocks} >= {"pyproject.toml", "tests/test_conformance.py"}
    for match in blocks:
        assert match["code"] in (EXAMPLE / match["file"]).read_text(encoding="utf-8"), match["file"]


@pytest.mark.parametrize(
    "file",
    [
        *("pyproject.toml", "tests/test_conformance.py"),
        *(f"src/polydraft_markov/{name}.py" for name in ("plugin", "tokenizer", "stepping", "whole")),
    ],
)
def test_the_guide_has_every_line_of_the_files_that_connect_an_engine(file):
    """So that the guide alone suffices; blocks are in the file's order."""
    blocks = [match["code"] for match in BLOCK.finditer(guide()) if match["file"] == file]
    shown = [line for code in blocks for line in code.splitlines() if line.strip()]
    lines = [line for line in (EXAMPLE / file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if lines[0].startswith('"""') and file.startswith("tests"):
        lines = lines[1:]  # what the test is about, the text says
    assert shown == lines


def test_the_other_code_of_the_guide_runs():
    blocks = [match["code"] for match in BLOCK.finditer(guide()) if match["language"] == "python" and not match["file"]]
    assert blocks
    for code in blocks:
        exec(compile(code, str(GUIDE), "exec"), {})


def test_the_links_of_the_guide_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", guide())
    assert links
    for link in links:
        assert (GUIDE.parent / link).exists(), link
    for anchor in re.findall(r"\]\(#([\w-]+)\)", guide()):
        headings = re.findall(r"^#+ (.*)$", guide(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("file", "most"), [("stepping.py", 120), ("whole.py", 80)])
def test_the_example_is_small(file, most):
    lines = (EXAMPLE / "src/polydraft_markov" / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) < most


def test_adopting_the_suite_takes_five_lines():
    lines = (EXAMPLE / "tests/test_conformance.py").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip() and not line.startswith('"""')]
    assert len(code) <= 5


def test_readme_and_contributing_lead_to_the_guide():
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "docs/plugin-guide.md" in (ROOT / name).read_text(encoding="utf-8")
