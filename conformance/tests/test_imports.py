"""Which imports of a plugin are private."""

from importlib import import_module

import pytest
from polydraft.contract import PUBLIC_MODULES
from polydraft_conformance.__main__ import main
from polydraft_conformance.imports import private_imports, source_of


@pytest.mark.parametrize(
    "source",
    [
        "import polydraft\npolydraft.load('x')\npolydraft.errors.EngineError\n",
        "import polydraft.contract as c\nc.Step\n",
        "from polydraft import Session, errors\nerrors.EngineError\n",
        "from polydraft.contract import Step, stepping\nstepping.SteppingEngine\n",
        "from polydraft.contract.records import Capabilities\n",
        "from polydraft.checkpoints import fetch\nfetch.fetch\n",
        "from . import loop\nfrom .polydraft import loop\nimport polydraft_markov.loop\n",
        "from polydraft_conformance.testing import assert_conforms\n",
        "class polydraft: loop = 1\n",
    ],
)
def test_public_imports_pass(tmp_path, source):
    (tmp_path / "plugin.py").write_text(source)
    assert private_imports(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import polydraft._loop.rounds\n", "polydraft._loop.rounds"),
        ("import polydraft\nx = polydraft._loop\n", "polydraft._loop"),
        ("import polydraft as p\nx = p._registry.pairs\n", "polydraft._registry"),
        ("import polydraft\nx = polydraft.errors._hidden\n", "polydraft.errors._hidden"),
        ("from polydraft import _loop\n", "polydraft._loop"),
        ("from polydraft.contract.records import Field\n", "polydraft.contract.records.Field"),
        ("from polydraft.sampling import _sampler\n", "polydraft.sampling"),
        ("from polydraft.verification import _steps\n", "polydraft.verification._steps"),
        ("from polydraft import *\n", "polydraft.*"),
        ("def f():\n    from polydraft._session.session import Session\n", "polydraft._session.session"),
        ("from polydraft_conformance.suite import Suite\n", "polydraft_conformance.suite"),
    ],
)
def test_private_imports_are_named_with_their_place(tmp_path, source, named):
    (tmp_path / "plugin.py").write_text(source)
    found = private_imports(tmp_path)
    assert len(found) == 1
    line = next(number for number, text in enumerate(source.splitlines(), 1) if named.rpartition(".")[2] in text)
    assert found[0].startswith(f"{tmp_path / 'plugin.py'}:{line}: ")
    assert named in found[0]


def test_public_modules_exist_and_say_what_of_them_is_public():
    for name in PUBLIC_MODULES:
        assert import_module(name).__all__, name


def test_the_command_names_what_is_private(tmp_path, capsys):
    (tmp_path / "plugin.py").write_text("import polydraft._loop\n")
    assert main(["imports", str(tmp_path)]) == 1
    assert "the module polydraft._loop is private" in capsys.readouterr().out
    assert main(["imports", "polydraft_reference"]) == 0
    assert main(["imports", "no_such_package"]) == 2
    assert "no_such_package" in capsys.readouterr().err


def test_a_package_is_found_without_importing_it():
    assert source_of("polydraft_reference").name == "polydraft_reference"
