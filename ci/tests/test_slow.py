"""``nox -s tests`` names every test that it leaves out."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "ci"))

import slow  # noqa: E402

SOURCE = """
import pytest
pytestmark = [pytest.mark.skipif(False, reason="x"), pytest.mark.slow("a server for each test")]
@pytest.mark.parametrize("a", [1])
@pytest.mark.slow("a thousand draws")
def test_one(a): pass
def test_other(): pass
"""


def test_they_are_found_with_their_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "plugins/engine/tests/deep"
    folder.mkdir(parents=True)
    (folder / "test_it.py").write_text(SOURCE)
    name = "plugins/engine/tests/deep/test_it.py"
    assert slow.tests(tmp_path) == [(name, "a server for each test"), (f"{name}::test_one", "a thousand draws")]


def test_a_reason_is_demanded(tmp_path: Path) -> None:
    (tmp_path / "core/tests").mkdir(parents=True)
    (tmp_path / "core/tests/test_it.py").write_text("import pytest\n@pytest.mark.slow\ndef test_one(): pass\n")
    with pytest.raises(ValueError, match="test_one is slow without a reason"):
        slow.tests(tmp_path)


def test_no_marker_is_overlooked() -> None:
    """Every marker in the repository is one that ``tests`` names."""
    files = [file for pattern in ("*/tests", "plugins/*/tests") for file in ROOT.glob(f"{pattern}/**/*.py")]
    written = sum(
        file.read_text(encoding="utf-8").count("pytest.mark.slow(") for file in files if file != Path(__file__)
    )
    assert len(slow.tests(ROOT)) == written
