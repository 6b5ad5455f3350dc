"""Install commands in hints work where they are shown: from a clone, a folder of wheels or an index."""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import polydraft._origin as origins
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from polydraft import _pip_command, _program
from polydraft._flags import in_flags
from polydraft._origin import Origin
from polydraft._pasteable import pasteable
from polydraft.contract import Diagnosis
from polydraft.errors import PolydraftError

ROOT = Path(__file__).parents[3]
CORE = tomllib.loads((ROOT / "core/pyproject.toml").read_text(encoding="utf-8"))
VERSION = CORE["project"]["version"]
EXTRAS = CORE["tool"]["hatch"]["metadata"]["hooks"]["custom"]["extras"]

pytestmark = pytest.mark.skipif(not (ROOT / "plugins").is_dir(), reason="the clone is not available")


@pytest.fixture
def whence(monkeypatch):
    """Set where polydraft came from, and the words that run pip."""

    def set_it(kind, folder=None, *, editable=False, pip=("pip",)):
        monkeypatch.setattr(_pip_command, "origin", lambda: Origin(kind, folder, editable))
        monkeypatch.setattr(_pip_command, "_pip", lambda verb: (*pip, verb))

    return set_it


def from_clone(name):
    return shlex.quote(str(ROOT / name))


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("Run: pip install 'polydraft[charts]'", "Run: pip install 'matplotlib>=3.8'"),
        ("Run: pip install 'polydraft[structured]'.", "Run: pip install 'llguidance<2,>=1.7'."),
        ('`pip install "polydraft[server]"`.', f"`pip install {from_clone('server')}`."),
        (
            "pip install 'polydraft[llama_cpp]'",
            f"pip install {from_clone('plugins/gguf')} {from_clone('plugins/llama_cpp')}",
        ),
        ("pip install 'polydraft[vllm]' vllm  # a GPU", f"pip install {from_clone('plugins/vllm')} vllm  # a GPU"),
        (
            "pip install 'polydraft[builtin,reference]'",
            f"pip install {from_clone('builtin_pairs')} {from_clone('plugins/reference')}",
        ),
        (
            "pip install polydraft-conformance[defects]",
            f"pip install {from_clone('plugins/reference')} {shlex.quote(str(ROOT / 'conformance[defects]'))}",
        ),
        ("pip install polydraft-of-a-third-party", "pip install polydraft-of-a-third-party"),
        ("pip install torch (polydraft[charts] is not meant)", "pip install torch (polydraft[charts] is not meant)"),
    ],
)
def test_from_a_clone(whence, written, shown):
    whence("clone", ROOT)
    found = pasteable(written)
    assert found == shown
    assert pasteable(found) == found


def test_from_a_clone_that_is_used_where_it_lies(whence):
    whence("clone", ROOT, editable=True)
    assert pasteable("pip install 'polydraft[reference]'") == f"pip install -e {from_clone('plugins/reference')}"


def test_from_a_folder_of_wheels(whence, tmp_path):
    folder = tmp_path / "my wheels"
    whence("wheels", folder)
    found = pasteable("Run: pip install 'polydraft[litert_lm]'")
    assert found == f"Run: pip install --find-links '{folder}' 'polydraft[litert-lm]'"
    assert pasteable(found) == found
    assert pasteable("pip install torch") == "pip install torch"


def test_from_an_index(whence):
    whence("index")
    assert pasteable("pip install 'polydraft[llama_cpp]'") == "pip install 'polydraft[llama-cpp]'"


def test_every_door(whence):
    whence("clone", ROOT)
    written, shown = "pip install 'polydraft[charts]'", "pip install 'matplotlib>=3.8'"
    assert PolydraftError("No.", written).hint == shown
    assert Diagnosis(usable=False, remedy=written, notes=(written,)).notes == (shown,)
    assert in_flags(f"Use `drafter=None` or {written}") == f"Use `--drafter none` or {shown}"


def test_the_environment_is_this_process_s(monkeypatch, tmp_path):
    """An environment that is not activated is named, and one without pip is filled by uv or another pip."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    here = {"pip": str(tmp_path / "bin/pip"), "uv": None}
    monkeypatch.setattr(_program.shutil, "which", here.get)
    monkeypatch.setattr(_program.sys, "executable", str(python))
    words = _pip_command._pip.__wrapped__
    assert words("install") == ("pip", "install")
    here["pip"] = "/elsewhere/pip"
    monkeypatch.setattr(_pip_command, "find_spec", lambda name: name)
    assert words("install") == (str(python), "-m", "pip", "install")
    monkeypatch.setattr(_pip_command, "find_spec", lambda name: None)
    assert words("uninstall") == ("pip", "--python", str(python), "uninstall")
    here["uv"] = "/usr/bin/uv"
    assert words("install") == ("uv", "pip", "install", "--python", str(python))


def test_the_command_line_names_its_own_program(monkeypatch, tmp_path):
    monkeypatch.setattr(_program.sys, "executable", str(tmp_path / "python"))
    here = {"polydraft": "/elsewhere/polydraft"}
    monkeypatch.setattr(_program.shutil, "which", here.get)

    def shown():
        _program._program.cache_clear()
        return in_flags("Install it: `polydraft engines install mlx`; `polydraft.load` finds it.")

    rest = "engines install mlx`; `polydraft.load` finds it."
    assert shown() == f"Install it: `{tmp_path}/python -m polydraft {rest}"
    (tmp_path / "polydraft").touch()
    assert shown() == f"Install it: `{tmp_path}/polydraft {rest}"
    here["polydraft"] = str(tmp_path / "polydraft")
    assert shown() == f"Install it: `polydraft {rest}"
    _program._program.cache_clear()


def test_commands_that_name_their_environment_are_left_alone():
    for command in (
        f"{sys.executable} -m pip install 'polydraft[charts]'",
        "uv pip install --python x 'polydraft[charts]'",
        "/env/bin/pip install 'polydraft[charts]'",
    ):
        assert pasteable(command) == command


@pytest.mark.parametrize(
    ("direct_url", "kind"),
    [
        (None, "index"),
        ({"url": (ROOT / "core").as_uri(), "dir_info": {}}, "clone"),
        ({"url": (ROOT / "core/README.md").as_uri(), "archive_info": {}}, "wheels"),
        ({"url": "file:///no-such-folder/polydraft-0.1.0-py3-none-any.whl", "archive_info": {}}, "index"),
        ({"url": "https://host/polydraft-0.1.0-py3-none-any.whl", "archive_info": {}}, "index"),
    ],
)
def test_the_origin_is_what_pip_has_noted(monkeypatch, tmp_path, direct_url, kind):
    class Installed:
        def read_text(self, name):
            return json.dumps(direct_url) if direct_url else None

    monkeypatch.setattr(origins, "__file__", str(tmp_path / "a/b/c/polydraft/_origin.py"))
    monkeypatch.setattr(origins, "distribution", lambda name: Installed())
    monkeypatch.setattr(origins, "version", lambda name: VERSION)
    found = origins.origin.__wrapped__()
    assert found.kind == kind
    assert not found.editable
    assert found.folder == {"clone": ROOT, "wheels": ROOT / "core"}.get(kind)


def hints():
    """Every command in the product's code that installs a part of polydraft."""
    found = set()
    for pattern in ("core/src", "plugins/*/src", "conformance/src", "server/src", "builtin_pairs/src"):
        for folder in ROOT.glob(pattern):
            for file in folder.rglob("*.py"):
                text = file.read_text(encoding="utf-8")
                found |= {match[0] for match in re.finditer(r"pip install (['\"]?)polydraft[-\w,\[\]]*\1", text)}
    assert len(found) > 10
    return sorted(found - {"pip install polydraft-my-engine"})  # the contract's example


@pytest.mark.parametrize("hint", hints())
def test_every_hint_names_what_there_is(whence, hint):
    wanted = Requirement(shlex.split(hint)[2])
    if wanted.name == "polydraft":
        assert {*map(canonicalize_name, wanted.extras)} <= {*EXTRAS}
    whence("clone", ROOT)
    for word in shlex.split(pasteable(hint))[2:]:
        if word.startswith("/"):
            assert (Path(word.partition("[")[0]) / "pyproject.toml").is_file()
        else:
            assert not word.startswith("polydraft")


def test_extras_are_written_in_the_normalised_way():
    """`hatch_build.py` adds the spellings with _; `nox -s release-check` installs both with an old pip."""
    assert [name for name in EXTRAS if name != canonicalize_name(name)] == []
