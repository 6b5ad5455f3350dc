"""Whether what `nox -s dist` built can be released: ``python ci/release.py DIST [--only EXTRA,...] [--final]``.

* The metadata of every wheel and source archive is complete, and all agree. With ``--final`` it has addresses, too
  (ci/addresses.py sets them).
* Each extra of the core installs from the wheels into an empty environment, with the oldest pip that this Python came
  with, and what it brings works.
* Each command that a hint shows can be run, for polydraft from a clone, from a folder of wheels, and from an index.

Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import email.parser
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from email.message import Message
from pathlib import Path

import addresses
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DATA = ROOT / "core/src/polydraft/_registry/data"
OLDEST_PIP = {(3, 11): "22.3", (3, 12): "23.2.1", (3, 13): "24.2"}
"""The pip that the first release of each Python brought."""
URLS = {"Documentation", "Source", "Issues", "Changelog"}
CLASSIFIERS = ("Development Status :: ", "Programming Language :: Python :: 3.11", "Typing :: Typed")

GENERATE = "polydraft generate 'import os' --max-new-tokens 12 --compare --backend"
SMOKE = {
    "transformers": ("transformers,builtin", f"{GENERATE} transformers --model builtin:tiny-e2b --dtype float32"),
    "llama-cpp": ("llama-cpp,builtin", f"{GENERATE} llama_cpp --model builtin:tiny-e2b"),
    "llama_cpp": ("llama_cpp,builtin", f"{GENERATE} llama_cpp --model builtin:tiny-e2b"),
    "xllamacpp": ("xllamacpp,builtin", f"{GENERATE} xllamacpp --model builtin:tiny-e2b"),
    "litert-lm": ("litert-lm", f"{GENERATE} litert_lm --model builtin:tiny-e2b-litertlm"),
    "litert_lm": ("litert_lm", f"{GENERATE} litert_lm --model builtin:tiny-e2b-litertlm"),
    "mlx": ("mlx,builtin", f"{GENERATE} mlx --model builtin:tiny-e2b"),
    "reference": ("reference", f"{GENERATE} reference --model builtin:toy"),
    # vLLM itself and Ollama's server are not dependencies.
    "vllm": ("vllm", "polydraft backends --json | grep '\"vllm-server\"'"),
    "ollama": ("ollama", "polydraft backends --json | grep '\"ollama\"'"),
    "builtin": ("builtin", "python -c 'import polydraft; assert polydraft.pairs()'"),
    "conformance": ("conformance,reference", "pytest -q --pyargs polydraft_conformance --polydraft-backend reference "
                    "--polydraft-quick -k availability"),
    "server": ("server,reference", "polydraft serve --help && python -c 'import polydraft_server'"),
    "structured": ("structured,reference", f"{GENERATE} reference --model builtin:toy --guided regex=[a-z]+"),
    "charts": ("charts", "python -c 'from polydraft._measuring.charts import check_can_draw; check_can_draw()'"),
}  # fmt: skip
"""Extra -> the extras to install, and a command that shows that what it brings works."""


def main() -> int:
    """Check all; the exit code is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="the folder of wheels and source archives")
    parser.add_argument(
        "--only", metavar="EXTRA,...", help="check the metadata, and only these extras; hints: the hints"
    )
    parser.add_argument("--final", action="store_true", help="what is checked goes to an index: it needs addresses")
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else [*SMOKE, "hints"]
    if unknown := sorted({*chosen} - {*SMOKE, "hints"}):
        parser.error(f"there is no {', '.join(unknown)} to check; there are {', '.join(SMOKE)} and hints")
    dist = given.dist.resolve()
    wrong = [f"metadata: {problem}" for problem in metadata_problems(dist, final=given.final)]
    for problem in wrong:
        print(problem, flush=True)
    for name in chosen:
        problems = hint_problems(dist) if name == "hints" else extra_problems(dist, name)
        print(f"{name}: {'; '.join(problems) or 'good'}", flush=True)
        wrong += problems
    return 1 if wrong else 0


def metadata_problems(dist: Path, *, final: bool = False) -> list[str]:
    """What is wrong with the metadata, one phrase each."""
    found = {path: metadata(path) for path in sorted(dist.iterdir()) if path.suffix in {".whl", ".gz"}}
    versions = {told["Version"] for told in found.values()}
    problems = [f"several versions: {', '.join(sorted(versions))}"] if len(versions) != 1 else []
    wheels = {canonicalize_name(told["Name"]) for path, told in found.items() if path.suffix == ".whl"}
    archives = {canonicalize_name(told["Name"]) for path, told in found.items() if path.suffix == ".gz"}
    problems += [f"{name} lacks its wheel or its source archive" for name in sorted(wheels ^ archives)]
    problems += [f"{name} was not built" for name in sorted(own_names() ^ wheels)]
    urls = {frozenset(told.get_all("Project-URL", ())) for told in found.values()}
    if len(urls) > 1:
        problems.append("their addresses differ: `python ci/addresses.py` sets them")
    labels = {line.partition(",")[0] for told in urls for line in told}
    if labels != URLS and (labels or final):
        problems.append(
            f"their addresses are {', '.join(sorted(labels)) or 'missing'}: `python ci/addresses.py` sets them"
        )
    for path, told in found.items():
        problems += [f"{path.name}: {problem}" for problem in _problems_of(told, wheels)]
        if final and (links := addresses.LINK.findall(str(told.get_payload()))):
            problems.append(f"{path.name}: its README links to {links[0]}, which no index has: run ci/addresses.py")
    offered = {extra for path, told in found.items() for extra in told.get_all("Provides-Extra", ())
               if told["Name"] == "polydraft" and path.suffix == ".whl"}  # fmt: skip
    return problems + [f"the extra {name} is not checked, or is not there" for name in sorted(offered ^ {*SMOKE})]


def _problems_of(told: Message, wheels: Set[str]) -> Iterator[str]:
    from trove_classifiers import classifiers

    if not told["License-Expression"] or not told.get_all("License-File"):
        yield "no licence"
    if told["Requires-Python"] != ">=3.11":
        yield f"Requires-Python is {told['Requires-Python']}"
    if not (
        told["Summary"] and told["Description-Content-Type"] == "text/markdown" and str(told.get_payload()).strip()
    ):
        yield "no summary or no description"
    named = told.get_all("Classifier", [])
    yield from (f"{name!r} is no classifier" for name in named if name not in classifiers)
    yield from (f"no classifier {name}" for name in CLASSIFIERS if not any(one.startswith(name) for one in named))
    needs = told.get_all("Requires-Dist", ())
    for extra in told.get_all("Provides-Extra", ()):
        if not any(f"extra == '{extra}'" in need for need in needs):
            yield f"the extra {extra} brings nothing"
    for requirement in map(Requirement, needs):
        name = canonicalize_name(requirement.name)
        if name.startswith("polydraft") and name not in wheels:
            yield f"{name} is required, and was not built"
        if requirement.url:
            yield f"{requirement.name} is required from an address"


def metadata(path: Path) -> Message:
    """The core metadata of a wheel or a source archive."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            text = wheel.read(name).decode()
    else:
        with tarfile.open(path) as archive:
            (member,) = (one for one in archive.getmembers() if re.fullmatch(r"[^/]+/PKG-INFO", one.name))
            file = archive.extractfile(member)
            assert file is not None
            text = file.read().decode()
    return email.parser.Parser().parsestr(text)


def own_names() -> set[str]:
    """Canonical names of the repository's distributions."""
    patterns = ("*/pyproject.toml", "plugins/*/pyproject.toml", "adapters/*/pyproject.toml")
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    return {canonicalize_name(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"]) for file in files}


def extra_problems(dist: Path, extra: str) -> list[str]:
    """What is wrong with an extra of the core, installed from the wheels."""
    extras, command = SMOKE[extra]
    with environment(extra) as (variables, folder):
        asked = f"pip install --no-compile --find-links {shlex.quote(str(dist))} 'polydraft[{extras}]'"
        for line in (asked, command):
            if problem := failed(line, variables, folder):
                return [problem]
    return []


def hint_problems(dist: Path) -> list[str]:
    """What is wrong with the commands that hints show, wherever polydraft came from."""
    (core,) = dist.glob("polydraft-[0-9]*.whl")
    problems = []
    origins = {
        "a clone": str(ROOT / "core"),
        "a clone, editable": f"-e {ROOT / 'core'}",
        "wheels": str(core),
        "an index": "polydraft",
    }
    for origin, what in origins.items():
        with environment("hints") as (variables, folder):
            if origin == "an index":  # what the user's pip is told to ask
                variables["PIP_FIND_LINKS"] = str(dist)
            # What builds the folders of a clone, editable ones included.
            if problem := failed(f"pip install --no-compile hatchling editables {what}", variables, folder):
                problems.append(f"{origin}: {problem}")
                continue
            script = f"from polydraft._pasteable import pasteable\nfor one in {hints()!r}:\n    print(pasteable(one))"
            shown = subprocess.run(["python", "-c", script], env=variables, capture_output=True, text=True, check=True)
            # What pip would install; nothing is. An option and no variable, which pip's own builds would obey as well.
            dry = (line.replace(" install ", " install --dry-run --no-build-isolation ", 1)
                   for line in dict.fromkeys(shown.stdout.splitlines()))  # fmt: skip
            found = (failed(line, variables, folder) for line in dry)
            problems += [f"{origin}: {problem}" for problem in found if problem]
    return problems


def hints() -> list[str]:
    """Every command in the product's code that installs a part of polydraft."""
    folders = [folder for pattern in ("*/src", "plugins/*/src") for folder in ROOT.glob(pattern)]
    texts = [file.read_text(encoding="utf-8") for folder in folders for file in folder.rglob("*.py")]
    pattern = re.compile(r"pip install (['\"]?)polydraft[-\w,\[\]]*\1")
    found = {match[0] for text in texts for match in pattern.finditer(text)}
    return sorted(found - {"pip install polydraft-my-engine"})  # the example of the contract


@contextmanager
def environment(extra: str) -> Iterator[tuple[dict[str, str], Path]]:
    """An empty environment with the oldest pip: the variables of a shell in it, and a folder to work in."""
    with tempfile.TemporaryDirectory(prefix="polydraft-release-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
        programs = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin")
        pip = f"pip=={OLDEST_PIP[sys.version_info[:2]]}"
        subprocess.run([str(programs / "python"), "-m", "pip", "install", "--quiet", pip], check=True)
        kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        path = os.pathsep.join([str(programs), os.environ.get("PATH", "")])
        yield (
            {
                **kept,
                "PATH": path,
                "VIRTUAL_ENV": str(folder / "env"),
                "PIP_CONSTRAINT": str(constraints(extra)),
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                "POLYDRAFT_DATA_DIR": str(folder / "data"),
                "XDG_CACHE_HOME": str(folder / "cache"),
                "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache/pip")),
            },
            folder,
        )


def constraints(extra: str) -> Path:
    """The versions that were tested with an extra's engine."""
    engines = tomllib.loads((DATA / "engines.toml").read_text(encoding="utf-8"))["engine"]
    tested: dict[str, str] = {engine["name"]: engine["tested"] for engine in engines}
    return DATA / "tested" / tested.get(extra.replace("-", "_"), "common.txt")


def failed(command: str, variables: Mapping[str, str], folder: Path) -> str:
    """Run a command as a user's shell would; what went wrong, empty if nothing."""
    shell: Sequence[str] = ("sh", "-c", command)
    done = subprocess.run(shell, env=variables, cwd=folder, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    warned = re.search(r"WARNING: .* does not provide the extra .*", output)
    if done.returncode == 0 and warned is None:
        return ""
    print(output[-3000:], file=sys.stderr)
    return f"`{command}`: {warned[0] if warned else f'exit code {done.returncode}'}"


if __name__ == "__main__":
    sys.exit(main())
