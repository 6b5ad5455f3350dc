"""A stand-in for uv that makes environments in milliseconds, and answers in place of an engine in them."""

import json
import os
import sys
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

from polydraft._environments import install, plan
from polydraft._probes.records import CataloguedBackend, PluginCatalogue
from polydraft.contract import BackendRecord
from polydraft.contract.records import CONTRACT_VERSION

_UV = """#!{python}
import json, os, pathlib, sys
asked, told = sys.argv[1:], json.loads(pathlib.Path({told!r}).read_text())
with open({calls!r}, "a") as calls:
    print(json.dumps(asked), file=calls)
if "-r" in asked:
    file = pathlib.Path(asked[asked.index("-r") + 1])
    with open({calls!r} + ".files", "a") as files:
        print(json.dumps([file.stat().st_mode & 0o777, file.read_text()]), file=files)
for word, (text, code) in told.items():
    if word in " ".join(asked):
        print(text)
        if code == "hang":
            import time
            print("hanging", flush=True)
            time.sleep(60)
        sys.exit(code)
if asked[0] == "venv":
    folder = pathlib.Path(asked[-1])
    packages = folder / "lib/python{minor}/site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to({base!r})
    (folder / "pyvenv.cfg").write_text("home = " + os.path.dirname({base!r}))
    (packages / "here.pth").write_text({path!r})
"""


class FakeUv:
    """What it is to say, by a word of its command line: the text, and its exit code or ``hang``."""

    def __init__(self, folder):
        self._told, self._calls = folder / "told.json", folder / "calls"
        self.tell({})
        self._calls.touch()
        program = folder / "uv"
        program.write_text(
            _UV.format(
                python=sys.executable,
                told=str(self._told),
                calls=str(self._calls),
                minor=".".join(map(str, sys.version_info[:2])),
                base=os.path.realpath(sys.executable),
                path="\n".join(entry for entry in sys.path if Path(entry).is_dir()),
            )
        )
        program.chmod(0o755)

    def tell(self, told):
        self._told.write_text(json.dumps(told))

    @property
    def calls(self):
        return [json.loads(line) for line in self._calls.read_text().splitlines()]

    @property
    def files(self):
        """Mode and text of each file of requirements that it was given."""
        return [json.loads(line) for line in Path(f"{self._calls}.files").read_text().splitlines()]


def be_quick(replace=setattr):
    """Nothing is started in an environment: one backend is found, and its self-test passes.

    The disk has room for any engine: nothing of its size is downloaded, so this machine's own disk is not asked.
    """
    usage = namedtuple("usage", "total used free")
    replace(plan.shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
    replace(install, "_catalogue", _catalogue)
    tested = {"tokens": [[1, 2], [1, 2]], "acceptance_rate": 0.5, "device": "cpu", "seconds": 0.1}
    replace(install._Making, "answer", lambda making, doing, request: tested)


def _catalogue(making):
    engine = making.plan.engine
    record = BackendRecord(
        name=engine.name,
        factory="a_plugin:Backend",
        summary="",
        formats=frozenset({"safetensors"}),
        drafter_kinds=frozenset({"ngram"}),
        engine=engine.distribution,
        install_hint="",
    )
    found = CataloguedBackend(record=record, plugin=engine.name, distribution=engine.distribution, version="0.1.0")
    catalogue = PluginCatalogue(
        polydraft=version("polydraft"),
        contract_version=CONTRACT_VERSION,
        python=".".join(map(str, sys.version_info[:3])),
        backends=(found,),
    )
    return catalogue, [found]
