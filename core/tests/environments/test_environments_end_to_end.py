"""An engine installed from this clone with the real tools, and used from a program that has only the core."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def polydraft(data):
    """Runs a command line with the data folder, and with no plugin of this process's environment."""

    def run(*arguments):
        # This environment's programs come first: nox installs uv into it.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        code = (
            "import polydraft._plugins as plugins, sys; from polydraft._cli.app import main; "
            "plugins.installed_plugins = lambda: ([], []); "
            f"sys.argv = ['polydraft', *{list(arguments)!r}]; main()"
        )
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


def test_the_reference_engine_from_the_clone(polydraft, data):
    ask = ("generate", "--backend", "reference", "--model", "builtin:toy", "-p", "def", "-n", "12", "-t", "0", "--json")
    missing = polydraft(*ask)
    assert missing.returncode == 1
    assert "`polydraft engines install reference`" in missing.stderr
    made = polydraft("engines", "install", "reference", "--from", str(ROOT), "--json")
    assert made.returncode == 0, made.stderr
    (environment,) = json.loads(made.stdout)["engines"]
    assert environment["source"]["kind"] == "clone"
    (test,) = environment["self_tests"]
    assert test["tokens"] == 24
    assert "[4/4]" in made.stderr
    generated = polydraft(*ask)
    assert generated.returncode == 0, generated.stderr
    result = json.loads(generated.stdout)
    assert result["running"]["process"] == "worker"
    listed = {one["name"]: one for one in json.loads(polydraft("engines", "list", "--json").stdout)["engines"]}
    assert listed["reference"]["state"] == "installed"
    assert polydraft("engines", "path", "reference").stdout.strip() == environment["folder"]
    assert polydraft("engines", "remove", "reference").stdout == "reference is removed.\n"
    assert not (data / "engines/reference").exists()
    assert polydraft("engines", "path", "reference").returncode == 1
