"""Checking and setting the version."""

import shutil
import sys
from pathlib import Path

import pytest
import version

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of all files that contain a version."""
    for path in (*version.files(ROOT), ROOT / "CHANGELOG.md"):
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_repository_states_one_version() -> None:
    assert version.problems(ROOT) == []


def test_a_new_version_reaches_every_distribution_and_the_changelog_once(tree: Path) -> None:
    distributions = [path for path in version.files(tree) if path.name == "pyproject.toml"]
    assert len(distributions) == 16
    for _ in range(2):
        version.set_version(tree, "7.9.3")
        assert version.problems(tree) == []
    for path in distributions:
        assert 'version = "7.9.3"' in path.read_text()
    assert '"polydraft>=7.9,<8"' in (tree / "plugins/vllm/pyproject.toml").read_text()
    assert '"polydraft[structured]>=7.9,<8"' in (tree / "adapters/llm/pyproject.toml").read_text()
    assert '"polydraft-conformance>=7.9,<8"' in (tree / "examples/third_party_plugin/pyproject.toml").read_text()
    assert '"polydraft>=7.9,<8"' in (tree / "docs/plugin-guide.md").read_text()
    changelog = (tree / "CHANGELOG.md").read_text()
    assert changelog.count("## [7.9.3] - 20") == 1
    assert changelog.index("## [Unreleased]") < changelog.index("## [7.9.3]") < changelog.index("### Added")


def test_other_requirements_stay(tree: Path) -> None:
    before = (tree / "plugins/transformers/pyproject.toml").read_text()
    version.set_version(tree, "1.4.0")
    after = (tree / "plugins/transformers/pyproject.toml").read_text()
    old = version.current(ROOT)
    assert after == before.replace(f'version = "{old}"', 'version = "1.4.0"').replace(
        f"polydraft{version.required(old)}", "polydraft>=1.4,<2"
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("plugins/mlx/pyproject.toml", 'version = "', 'version = "7', "plugins/mlx/pyproject.toml: 'version"),
        ("plugins/mlx/pyproject.toml", "polydraft>=", "polydraft>=7", "polydraft>=7"),
        ("docs/plugin-guide.md", "polydraft>=", "polydraft>=7", "docs/plugin-guide.md"),
        ("CHANGELOG.md", "## [Unreleased]", "## [Unreleased]\n\n## [7.0.0] - 2030-01-01", "7.0.0 is newer"),
        ("CHANGELOG.md", "## [Unreleased]", "", "no heading"),
    ],
)
def test_what_differs_is_named(tree: Path, file: str, old: str, new: str, said: str) -> None:
    assert version.problems(tree) == []
    change(tree / file, old, new)
    (problem,) = version.problems(tree)
    assert said in problem


def test_a_requirement_without_a_range_is_a_problem(tree: Path) -> None:
    wanted = version.required(version.current(ROOT))
    change(tree / "plugins/mlx/pyproject.toml", f"polydraft{wanted}", "polydraft")
    assert version.problems(tree) == [f"plugins/mlx/pyproject.toml: 'polydraft' needs a range, {wanted}"]


def test_before_1_0_a_minor_release_may_break() -> None:
    assert version.required("0.9.3") == ">=0.9,<0.10"
    assert version.required("1.4.0") == ">=1.4,<2"


@pytest.mark.parametrize("given", [["0.2"], ["v0.2.0"], ["0.2.0rc1"], ["0.2.0", "more"]])
def test_another_form_is_refused_before_anything_is_written(
    given: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "ROOT", tree)
    monkeypatch.setattr(sys, "argv", ["version.py", *given])
    assert version.main() == 2
    assert version.current(tree) == version.current(ROOT)
    monkeypatch.setattr(sys, "argv", ["version.py", "0.7.0"])
    assert version.main() == 0
    assert version.current(tree) == "0.7.0"
