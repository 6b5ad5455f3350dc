"""What `nox -s release-check` finds wrong with metadata, and what it checks."""

import importlib.util
import io
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CHARTS = "Provides-Extra: charts\nRequires-Dist: matplotlib>=3.8; extra == 'charts'\n"
GOOD = """Metadata-Version: 2.4
Name: {name}
Version: 0.1.0
Summary: x
Project-URL: Documentation, https://x
Project-URL: Source, https://x
Project-URL: Issues, https://x
Project-URL: Changelog, https://x
License-Expression: Apache-2.0
License-File: LICENSE
Classifier: Development Status :: 3 - Alpha
Classifier: Programming Language :: Python :: 3.11
Classifier: Typing :: Typed
Requires-Python: >=3.11
{more}Description-Content-Type: text/markdown

{words}
"""


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_release", ROOT / "ci/release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "own_names", lambda: {"polydraft"})
    monkeypatch.setattr(module, "SMOKE", {"charts": ("charts", "true")})
    return module


def write(
    folder: Path, *, name: str = "polydraft", more: str = CHARTS, words: str = "Words.", without: str = ""
) -> Path:
    whole = GOOD.format(name=name, more=more, words=words)
    text = "".join(line for line in whole.splitlines(True) if not line.startswith(without or "\0"))
    with zipfile.ZipFile(folder / f"{name}-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}-0.1.0.dist-info/METADATA", text)
    with tarfile.open(folder / f"{name}-0.1.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"{name}-0.1.0/PKG-INFO")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text.encode()))
    return folder


def test_good_metadata(release: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trove_classifiers")
    assert release.metadata_problems(write(tmp_path), final=True) == []


def test_addresses_are_needed_at_last(release: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trove_classifiers")
    write(tmp_path, without="Project-URL")
    assert release.metadata_problems(tmp_path) == []
    assert "their addresses are missing" in str(release.metadata_problems(tmp_path, final=True))


def test_links_of_a_readme_need_an_address_at_last(release: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trove_classifiers")
    write(tmp_path, words="[a](https://x/y) [b](#z) [c](../../docs/tuning.md#k)")
    assert release.metadata_problems(tmp_path) == []
    assert "links to ../../docs/tuning.md, which no index has" in str(release.metadata_problems(tmp_path, final=True))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"without": "License-File"}, "no licence"),
        ({"without": "Project-URL: Issues"}, "their addresses are"),
        ({"without": "Classifier: Typing"}, "no classifier Typing"),
        ({"more": "Provides-Extra: charts\nClassifier: Nonsense\n"}, "'Nonsense' is no classifier"),
        ({"more": "Provides-Extra: charts\nRequires-Dist: polydraft-gone>=0.1\n"}, "polydraft-gone is required"),
        ({"more": "Provides-Extra: new\n"}, "the extra charts is not checked, or is not there"),
        ({"more": f"Provides-Extra: empty\n{CHARTS}"}, "the extra empty brings nothing"),
        ({"name": "polydraft-other"}, "polydraft was not built"),
    ],
)
def test_problems_are_told(release: ModuleType, tmp_path: Path, arguments: dict[str, str], problem: str) -> None:
    pytest.importorskip("trove_classifiers")
    assert any(problem in told for told in release.metadata_problems(write(tmp_path, **arguments)))


def test_what_an_old_pip_only_warns_of_is_a_problem(release: ModuleType, tmp_path: Path) -> None:
    warning = "WARNING: polydraft 0.1.0 does not provide the extra 'x'"
    assert warning in release.failed(f'echo "{warning}"', {}, tmp_path)
    assert release.failed("true", {}, tmp_path) == ""
    assert "exit code 3" in release.failed("exit 3", {}, tmp_path)


def test_every_extra_is_checked() -> None:
    spec = importlib.util.spec_from_file_location("ci_release", ROOT / "ci/release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    core = tomllib.loads((ROOT / "core/pyproject.toml").read_text(encoding="utf-8"))
    extras = {*core["tool"]["hatch"]["metadata"]["hooks"]["custom"]["extras"]}
    assert {*module.SMOKE} == extras | {name.replace("-", "_") for name in extras}


def test_what_is_not_there_cannot_be_checked(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["release.py", str(tmp_path), "--only", "charts,chart"])
    with pytest.raises(SystemExit):
        release.main()
    assert "there is no chart to check; there are charts and hints" in capsys.readouterr().err
