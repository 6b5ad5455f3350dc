"""Facts that are stated in several places of the repository agree."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "*/README.md",
        "plugins/*/README.md",
        "adapters/*/README.md",
        "examples/*/README.md",
        ".github/**/*.md",
    )
    for path in ROOT.glob(pattern)
    if not {".nox", ".venv", "conformance-reports"} & {*path.relative_to(ROOT).parts}
)


def command_of_the_readme() -> list[str]:
    """The README's test command, without creating its environment."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.endswith("nox -s tests")]
    first, *steps = line.split(" && ")
    assert first == "python3 -m venv .venv"
    return [step.removeprefix(".venv/bin/") for step in steps]


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    return found


def test_hosted_machines_run_the_readmes_test_command(workflow: dict[str, Any]) -> None:
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == command_of_the_readme()
    assert {entry["os"].partition("-")[0] for entry in job["strategy"]["matrix"]["include"]} == {
        "ubuntu",
        "macos",
        "windows",
    }


def test_hosted_machines_have_supported_pythons(workflow: dict[str, Any]) -> None:
    classifiers = (ROOT / "core/pyproject.toml").read_text(encoding="utf-8")
    for entry in workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]:
        assert f"Programming Language :: Python :: {entry['python']}" in classifiers


def test_sessions_that_documents_name_exist() -> None:
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = {*re.findall(r"^def (\w+)\(session: nox\.Session", noxfile, re.MULTILINE)}
    sessions |= {*re.findall(r"@nox\.session\(name=\"([\w-]+)\"", noxfile)}
    workflow = ROOT / ".github/workflows/tests.yml"
    for path in (*DOCUMENTS, workflow):
        for named in re.findall(r"nox -s ((?:[a-z_]+(?:-[a-z]+)* ?)+|\"\w+)", path.read_text(encoding="utf-8")):
            assert {*re.findall(r"\w+(?:-\w+)*", named)} <= sessions, (path.name, named)


COPIES = {
    "licence": sorted({ROOT / "LICENSE", *ROOT.glob("*/LICENSE"), *ROOT.glob("*/*/LICENSE")}),
    **{
        name: sorted(ROOT.glob(f"builtin_pairs/src/*/data/*/{name}"))
        for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    },
}
COPIES["chat_template.jinja"].append(ROOT / "builtin_pairs/training/chat_template.jinja")


def test_there_is_a_copy_in_every_place() -> None:
    """Each distribution needs the licence in its own folder (PEP 639), and each checkpoint must stand alone."""
    distributions = {path.parent for pattern in ("*", "*/*") for path in ROOT.glob(f"{pattern}/pyproject.toml")}
    assert {path.parent for path in COPIES["licence"]} == {*distributions, ROOT}
    checkpoints = {path.parent for path in ROOT.glob("builtin_pairs/src/*/data/*/config.json")}
    assert len(checkpoints) >= 8
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert {path.parent for path in COPIES[name]} == checkpoints


@pytest.mark.parametrize("name", COPIES)
def test_all_copies_are_equal(name: str) -> None:
    first, *others = COPIES[name]
    assert [path for path in others if path.read_bytes() != first.read_bytes()] == []


def slugs(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), link


def test_all_txt_names_what_shares_one_environment() -> None:
    lines = (ROOT / "all.txt").read_text(encoding="utf-8").splitlines()
    named = {line.removeprefix("./") for line in lines if line.startswith("./")}
    there = {
        str(file.parent.relative_to(ROOT))
        for pattern in ("*", "plugins/*")
        for file in ROOT.glob(f"{pattern}/pyproject.toml")
    }
    data = ROOT / "core/src/polydraft/_registry/data/engines.toml"
    apart = {
        engine["folder"]
        for engine in tomllib.loads(data.read_text(encoding="utf-8"))["engine"]
        if engine["tested"] != "common.txt"
    }
    assert named == there - apart


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_install_lines_work_in_a_clone(path: Path) -> None:
    """Nothing is on an index yet, so what is installed are the clone's folders."""
    fences = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in re.findall(r"\bpip install ([^\n#]+)", "\n".join(fences).replace("\\\n", "")):
        words = [word.partition("[")[0] for word in shlex.split(line.partition(" && ")[0])]
        assert not [word for word in words if word.startswith("polydraft")], line
        folders = [word for word in words if word.startswith(("./", "../"))]
        here = path.parent if folders and folders[0].startswith("../") else ROOT
        assert not [word for word in folders if not (here / word / "pyproject.toml").is_file()], line
