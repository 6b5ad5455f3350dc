"""The project's tasks. Each makes its own environment, so Python and nox are all you need.

nox -s demo                          generate with speculation on the built-in pair, and compare with plain decoding
nox -s tests                         what every change must pass on this machine, several sessions at a time
nox -s everything                    the same, with all that `tests` leaves out for time: hours
nox -s lint types unit wheels        single checks
nox -s third_party                   the example plugin from a wheel, outside the repository
nox -s dist                          source archives and wheels for a release, into dist/
nox -s release-check                 the same, and whether they can be released
nox -s "conformance(transformers)"   the conformance suite on one backend
nox -s docs                          the documentation as a site, in site/
nox -s report                        one page of all results in conformance-reports/

What follows ``--`` goes to the command that a session runs: ``nox -s demo -- --prompt "def main():" -n 100``.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nox
from packaging.markers import Marker

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"  # with pip, which reads the user's own settings, unlike uv
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "ci"))  # sessions import modules from there
# nox looks for uv even where no session uses it, and says that it found none.
logging.getLogger("nox").addFilter(lambda record: record.getMessage() != "uv binary not found.")
CONSTRAINTS = Path(os.environ.get("POLYDRAFT_CONSTRAINTS", ROOT / "constraints.txt")).resolve()
"""The versions to install; CONTRIBUTING.md says when to name another file."""
TOOLS = ROOT / "ci/tools.txt"
"""The versions of the tools, for environments that have an engine's own constraints."""
REPORTS = ROOT / "conformance-reports"
DATA = ROOT / "core/src/polydraft/_registry/data"
ENGINES: dict[str, dict[str, Any]] = {
    engine["name"]: engine for engine in tomllib.loads((DATA / "engines.toml").read_text(encoding="utf-8"))["engine"]
}
"""What `polydraft engines install` installs: the checks install the same, without an accelerator."""

# The built-in models are so small that threads cost more than they gain. If two processes compete for cores, the
# threads of one spin while they wait for the other's cores, and both become many times slower. Torch, OpenBLAS (numpy,
# MLX), vLLM and the llama.cpp plugin respect this variable.
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

CORE, PAIRS, CONFORMANCE, SERVER = "core", "builtin_pairs", "conformance", "server"
EXAMPLE_PLUGIN = "examples/third_party_plugin"
GGUF = "plugins/gguf"
"""What the plugins for llama.cpp share; no plugin."""
XLLAMACPP = "plugins/xllamacpp"
ADAPTERS = ("adapters/llm", "adapters/langchain")
"""polydraft as a model of other programs."""


@dataclass(frozen=True)
class Backend:
    """A backend of this repository."""

    name: str
    """Name of its engine in `ENGINES`."""
    options: tuple[str, ...] = ()
    """Options of the suite: quick runs for engines whose full run is too long for CI; give others after ``--``."""
    full: tuple[str, ...] = ()
    """Options of the full run, for `everything`."""
    parallel: bool = True
    """Whether several processes may run its checks at the same time."""
    further: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Other backends of the plugin, with the suite's options for each."""
    workers: tuple[str, ...] = ()
    """Options of a run of the suite over worker processes, in which each session imports the engine again; empty: only
    `everything` has one."""
    also: tuple[str, ...] = ()
    """Further plugins that its checks need."""
    compiled: tuple[str, ...] = ()
    """Packages that are compiled for this processor, in place of the library that the plugin brings."""
    programs: Mapping[str, str] = field(default_factory=dict)
    """Environment variable -> the program of this environment that it names."""
    protocol: str = ""
    """Why only its plugin's own tests run, against a stand-in for its server, and not the suite; in sentences."""
    minutes: int = 10
    """About how many minutes its checks take, installation included; `MINUTES` orders sessions by it."""

    @property
    def folder(self) -> str:
        """Folder of its distribution."""
        return str(ENGINES[self.name]["folder"])

    @property
    def variants(self) -> list[dict[str, Any]]:
        """The ways of installing the engine that the checks use: for processors, and for Apple's GPUs."""
        return [variant for variant in ENGINES[self.name]["variant"] if variant["accelerator"] != "cuda"]

    @property
    def needs(self) -> str:
        """PEP 508 marker of the platforms for which its engine has packages; empty: all."""
        markers = [variant.get("needs", "") for variant in self.variants]
        return " or ".join(f"({marker})" for marker in markers) if all(markers) else ""

    @property
    def installs_here(self) -> bool:
        """Whether the engine can be installed on this platform."""
        return not self.needs or Marker(self.needs).evaluate()

    @property
    def constraints(self) -> tuple[Path, ...]:
        """The versions of its environment: the shared ones, or the engine's own and those of the tools."""
        tested = ENGINES[self.name]["tested"]
        return (CONSTRAINTS,) if tested == "common.txt" else (DATA / "tested" / tested, TOOLS)

    def steps(self, kind: str) -> tuple[str, ...]:
        """The packages that steps of a kind name: `install` or `remove`."""
        fitting = [one for one in self.variants if not one.get("needs") or Marker(one["needs"]).evaluate()]
        return tuple(name for step in fitting[0].get("steps", ()) for name in step.get(kind, ()))


# One seed: what fails then is the change's doing. `everything` draws another one for each run.
QUICK = ("--polydraft-quick", "--polydraft-seed", "202611")
PATIENT = ("--polydraft-time-limit", "300")
ONE_PAIR = ("--polydraft-pairs", "tiny-e2b", "--polydraft-kinds", "mtp")
BACKENDS = {
    "transformers": Backend(
        "transformers", options=(*QUICK, "--polydraft-pairs", "tiny-e2b,tiny-26b,tiny-llama"), minutes=9
    ),
    "reference": Backend(
        "reference",
        options=QUICK,
        workers=(*QUICK, "-k", "workers or generation or greedy or cancelling or finishes or at_once"),
        minutes=3,
    ),
    # On the library that llama-cpp-python compiles in some minutes; the plugin's own tests run that of the wheel, too.
    # The program of the backend llama-server is that of the plugin xllamacpp here: llama.cpp's own server, too.
    "llama_cpp": Backend(
        "llama_cpp",
        compiled=("llama-cpp-python",),
        also=(XLLAMACPP,),
        options=QUICK,
        programs={"POLYDRAFT_LLAMA_SERVER": "polydraft-xllamacpp"},
        further=(("llama-server", (*QUICK, *ONE_PAIR)),),
        minutes=9,
    ),
    "xllamacpp": Backend("xllamacpp", options=(*QUICK, "--polydraft-pairs", "tiny-e2b,tiny-llama"), minutes=4),
    "ollama": Backend(
        "ollama",
        also=(XLLAMACPP,),  # in place of the llama-server that Ollama starts
        protocol="No package index has Ollama's server. Its plugin is tested against a stand-in that speaks the "
        "documented API, and what it creates in llama.cpp's own server, with the arguments that Ollama gives it.",
        minutes=2,
    ),
    "litert_lm": Backend("litert_lm", options=QUICK, minutes=3),
    "mlx": Backend(
        "mlx",
        # MLX multiplies matrices slowly on CPUs: of the pair with experts, what depends on the model.
        options=(
            *(*QUICK, "--polydraft-pairs", "tiny-e2b,tiny-26b", "-k"),
            "not tiny-26b or generation or greedy or primitives or reference_logits or bitwise or context or turns",
        ),
        minutes=7,
    ),
    "vllm": Backend(
        "vllm",
        options=(
            *(*QUICK, *PATIENT, "--polydraft-one-session"),
            *("--polydraft-pairs", "tiny-e2b", "--polydraft-kinds", "mtp"),
        ),
        full=PATIENT,
        parallel=False,  # its engines have worker processes and gigabytes of their own
        # Besides the installation (3 minutes), most of it is importing vLLM: 10 seconds per process, 15 per server.
        # Each vllm-server session starts a server, so it gets one.
        further=(
            (
                "vllm-server",
                (
                    *QUICK,
                    *PATIENT,
                    "--polydraft-one-session",
                    *("--polydraft-pairs", "tiny-e2b", "--polydraft-kinds", "mtp"),
                    *(
                        "-k",
                        "availability or generation or greedy or refusals or finishes or lifecycle or test_speculation",
                    ),
                ),
            ),
        ),
        minutes=16,
    ),
}
DISTRIBUTIONS = (CORE, GGUF, *(backend.folder for backend in BACKENDS.values()), PAIRS, CONFORMANCE, SERVER, *ADAPTERS)

MINUTES = {
    "lint": 0,
    "types": 2,
    "wheels": 3,
    "third_party": 2,
    "adapters": 1,
    "unit": 9,
    "suite": 8,
    **{f"conformance({name})": backend.minutes for name, backend in BACKENDS.items()},
}
"""The sessions of `tests`, and about how many minutes they take on one Intel core: the longest start first."""
LONG = {"long(vllm)": 30, "clients": 12, "browser": 3, "batches": 5, "load": 6, "kernels": 6, "peers": 3}
"""Those that only `everything` runs, besides the others in full."""
MOST_LANES = 4
"""How many of them run at a time at most. More would gain nothing: the longest takes a quarter of the total time."""
EVERYTHING = "POLYDRAFT_EVERYTHING"
"""The environment variable that `everything` sets for the sessions that it runs."""

DEMO_PROMPT = """class Stack:
    \"\"\"A stack of items.\"\"\"

    def __init__(self):
        self.items = []

    def push(self, item):
"""
# float32: in bfloat16 a near tie may flip, and CPUs are slow at it.
# Sampled with a seed: with greedy decoding, so small a model soon repeats itself.
DEMO = (
    *("--prompt", DEMO_PROMPT, "--max-new-tokens", "120", "--dtype", "float32"),
    *("--temperature", "0.7", "--seed", "4"),
)


def prepare(session: nox.Session) -> None:
    """Set the environment variables of a session that runs Python programs.

    Byte code is kept even if the user's settings say not to, but outside the checkout. Sessions start dozens of Python
    processes, and without byte code each compiles what it imports: 20 seconds for vLLM, 5 for Transformers.
    """
    byte_code = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(session.env_dir.resolve() / "byte-code")}
    session.env.update({**THREADS, **byte_code})


def install(session: nox.Session, *what: str, constraints: Sequence[Path] = (CONSTRAINTS,)) -> None:
    """Install with the pinned versions. Byte code is compiled on first import: most of torch is never imported.

    One hatchling builds all distributions of this repository. pip would make an environment to build each in, which
    takes two to three seconds; that the builds need nothing else shows `wheels`.
    """
    options = ["--quiet", "--no-compile", *(word for path in constraints for word in ("-c", str(path)))]
    if any(one.startswith("./") for one in what):
        session.install(*options, "hatchling")
        options.append("--no-build-isolation")
    session.install(*options, *what)


def folders(*names: str) -> list[str]:
    """Distributions of this repository as pip arguments: ``./core``, with extras ``./core[builtin]``."""
    return [f"./{name}" for name in names]


def install_engine(session: nox.Session, plugin: Backend) -> None:
    """Install a plugin with its engine, the built-in pairs and the tools of the tests, in the engine's versions."""
    versions = plugin.constraints
    if first := plugin.steps("install"):
        install(session, *first, constraints=versions)
    for package in plugin.compiled:
        wheels = str(compiled_wheels(session, package, versions))
        install(session, "--find-links", wheels, "--only-binary", package, package)
    if unfit := plugin.steps("remove"):
        session.run("pip", "uninstall", "--yes", "--quiet", *unfit)
    tools = ("pytest", "pytest-xdist", "hypothesis")
    own = (CORE, PAIRS, CONFORMANCE, *ENGINES[plugin.name].get("also", {}).values(), *plugin.also, plugin.folder)
    install(session, *tools, *folders(*own), constraints=versions)
    for variable, program in plugin.programs.items():
        session.env[variable] = str(Path(session.bin) / program)


def pins(path: Path) -> Iterator[str]:
    """The lines of a constraints file, those of the files that it refers to included."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-c "):
            yield from pins(path.parent / line.removeprefix("-c ").strip())
        elif line and not line.startswith("#"):
            yield line.strip()


def compiled_wheels(session: nox.Session, package: str, versions: Sequence[Path]) -> Path:
    """The folder of a package's wheel for this processor; compiles the wheel if it is missing.

    pip caches compiled wheels by name and version alone. If two machines share a home folder, a wheel compiled on one
    crashes on the other if that lacks an instruction set.
    """
    install(session, *folders(CORE), constraints=versions)
    program = "from polydraft.hardware import cpu_model; print(cpu_model())"
    cpu = str(session.run("python", "-c", program, silent=True)).strip()

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polydraft-nox"
    folder = cache / re.sub(r"[^\w.]+", "-", f"{cpu}-{platform.python_version()}")
    pin = next((line for path in versions for line in pins(path) if line.startswith(f"{package}==")), package)
    wanted = pin.replace("==", "-").replace("-", "_")
    if not any(path.name.replace("-", "_").startswith(f"{wanted}_") for path in folder.glob("*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        session.run("pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", str(folder), pin)
    return folder


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest. After Ctrl+C it gets time to stop the servers that its tests have started."""
    fast = () if EVERYTHING in os.environ else ("-m", "not slow")
    session.run("pytest", *fast, *arguments, interrupt_timeout=10, terminate_timeout=2)


@nox.session
def demo(session: nox.Session) -> None:
    """Generate with speculation on the built-in pair, drafts in colour, and compare with plain decoding."""
    prepare(session)
    install(session, *folders(CORE, BACKENDS["transformers"].folder, PAIRS))
    session.run("polydraft", "generate", "--show-drafts", "--compare", "--runs", "5", *(session.posargs or DEMO))


@nox.session
def picture(session: nox.Session) -> None:
    """Draw the README's picture: what the demo shows. On a machine that does nothing else, for its speeds."""
    prepare(session)
    install(session, *folders(CORE, BACKENDS["transformers"].folder, PAIRS))
    demo = ["polydraft", "generate", "--show-drafts", "--compare", "--runs", "5", *DEMO]
    session.run("python", "ci/picture.py", "docs/demo.svg", "nox -s demo", *demo)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site into site/; once this session is installed, without network."""
    prepare(session)
    tools = ("mkdocs", "mkdocs-material", "mkdocstrings[python]", "ruff")  # ruff breaks long signatures into lines
    install(session, *tools, *folders(CORE, CONFORMANCE))
    session.run("python", "ci/pages.py", "--check")
    session.run("mkdocs", "build", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})
    session.log("Open site/index.html; to search it, too: python3 -m http.server --directory site")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """What every change must pass, or the sessions named after ``--``, as many at a time as there are cores.

    Each is a session below, with an environment of its own. POLYDRAFT_LANES sets how many run at a time; with 1 they
    run one after the other in this nox, and their output appears as it is written.
    """
    try:
        run_sessions(session, MINUTES)
    finally:
        if not session.posargs:
            session.log("Left out for time, and run by `nox -s everything`:")
            for line in left_out():
                session.log(f"* {line}")


@nox.session(venv_backend="none")
def everything(session: nox.Session) -> None:
    """All that `tests` runs and all that it leaves out: slow tests, and the suite in full on every backend."""
    os.environ[EVERYTHING] = "1"
    run_sessions(session, {**MINUTES, **LONG})


def left_out() -> list[str]:
    """What `tests` leaves out for time, one line each."""
    import slow

    suites = [
        f"the suite on {name}, except for {shlex.join(options)}"
        for backend, plugin in BACKENDS.items()
        for name, options in ((backend, plugin.options), *plugin.further)
        if options != plugin.full and not plugin.protocol
    ]
    suites += [
        f"the suite on {name} over workers{f', except for {shlex.join(plugin.workers)}' if plugin.workers else ''}"
        for name, plugin in BACKENDS.items()
        if not plugin.protocol
    ]
    return [*(f"{test.name}: {test.reason}" for test in slow.tests(ROOT)), *suites, *LONG]


def run_sessions(session: nox.Session, minutes: dict[str, int]) -> None:
    """Run sessions, or those of them named after ``--``; an error if one fails.

    Args:
        session: The session that they are run for.
        minutes: About how many minutes each takes: the longest start first.
    """
    unknown = sorted({*session.posargs} - {*minutes})
    if unknown:
        session.error(f"`{session.name}` does not run {', '.join(unknown)}; it runs {', '.join(minutes)}")
    chosen = sorted((name for name in minutes if name in (session.posargs or minutes)), key=minutes.__getitem__)
    import lanes

    wanted = os.environ.get("POLYDRAFT_LANES", "")
    if not re.fullmatch("[1-9][0-9]*|", wanted):
        session.error(f"POLYDRAFT_LANES is {wanted!r}; it must be the number of sessions to run at a time, such as 2")
    count = int(wanted) if wanted else min(lanes.usable_cores(), MOST_LANES)
    if count == 1 or len(chosen) == 1 or sys.platform == "win32":
        for name in chosen:
            session.notify(name, posargs=())
        return
    # The longest first, so that all lanes end at about the same time; but lint first of all, as it takes only seconds.
    chosen.sort(key=lambda name: (name != "lint", -minutes[name]))
    ended = lanes.run(
        chosen,
        lanes.command(sys.argv[1:], coloured=sys.stdout.isatty()),
        lanes=count,
        logs=Path(session.create_tmp()),
        folder=session.invoked_from,
        say=session.log,
        stop_at_failure=not {"-x", "--stop-on-first-error"}.isdisjoint(sys.argv),
    )
    session.log(f"{len(ended)} of {len(chosen)} sessions ran, {count} at a time:")
    for outcome in ended:
        (session.log if outcome.good else session.warn)(f"* {outcome.name}: {outcome}")
    failed = [outcome.name for outcome in ended if not outcome.good]
    if failed:
        session.error(f"{len(failed)} of {len(ended)} sessions failed: {', '.join(failed)}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff's rules and formatting. One version in all distributions. Plugins import nothing private."""
    prepare(session)
    install(session, "ruff", *folders(CORE, CONFORMANCE))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "ci/version.py")
    plugins = (GGUF, *(backend.folder for backend in BACKENDS.values()), PAIRS, SERVER, *ADAPTERS, EXAMPLE_PLUGIN)
    session.run("polydraft-conformance", "imports", *(f"{folder}/src" for folder in plugins))


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy --strict (set in pyproject.toml), all distributions at once.

    Engines conflict with one another, so only Transformers is installed here: calls of the others are unchecked.
    """
    prepare(session)
    install(session, "mypy", "nox", *folders(CORE, PAIRS, CONFORMANCE, SERVER, BACKENDS["transformers"].folder))
    plugins = [GGUF, *(backend.folder for backend in BACKENDS.values())]
    install(session, "--no-deps", *folders(*plugins, *ADAPTERS))
    # At once: one call after the other would check the core again where it is imported as installed.
    sources = (f"{folder}/src" for folder in (CORE, PAIRS, CONFORMANCE, SERVER, *plugins, *ADAPTERS))
    session.run("mypy", *sources, "noxfile.py", "ci", "examples", f"{SERVER}/long_tests/load.py")


@nox.session
def unit(session: nox.Session) -> None:
    """Unit tests of the core, the server, the built-in pairs, the reference engine and ci/."""
    prepare(session)
    # Some of the core's tests are about Transformers.
    needed = [CORE, PAIRS, CONFORMANCE, *(BACKENDS[name].folder for name in ("transformers", "reference"))]
    # uv: an environment is made in a test
    tools = ("pytest", "hypothesis", "matplotlib", "trove-classifiers", "uv")
    install(session, *tools, *folders(*needed, f"{SERVER}[test]"))
    tested = (CORE, SERVER, PAIRS, BACKENDS["reference"].folder, "ci")
    pytest(session, *(f"{folder}/tests" for folder in tested), *session.posargs)


@nox.session
def suite(session: nox.Session) -> None:
    """The conformance suite's own tests: what it says of honest and of defective backends."""
    prepare(session)
    needed = (CORE, PAIRS, CONFORMANCE, BACKENDS["reference"].folder)
    install(session, "pytest", "pytest-xdist", "hypothesis", *folders(*needed))
    # They run pytest inside pytest.
    pytest(session, "-p", "pytester", f"{CONFORMANCE}/tests", *session.posargs)


@nox.session
@nox.parametrize("backend", [nox.param(name, id=name) for name in BACKENDS])
def conformance(session: nox.Session, backend: str) -> None:
    """One backend: its plugin's own tests, then the suite; reports go to conformance-reports/<backend>.

    What follows ``--`` goes to the suite instead of the options of a quick run: ``-- -ra`` runs it in full.
    """
    prepare(session)
    plugin = BACKENDS[backend]
    report = REPORTS / backend
    if not plugin.installs_here:
        install(session, *folders(CORE, CONFORMANCE))
        reason = f"{plugin.folder} needs a platform where {plugin.needs}."
        session.run("polydraft-conformance", "unavailable", backend, "--reason", reason, "--report", str(report))
        return
    install_engine(session, plugin)
    workers = workers_here() if plugin.parallel else "0"
    if backend != "reference":  # `unit` runs its tests
        pytest(session, "-n", workers, "--dist", "loadfile", f"{plugin.folder}/tests")
    if plugin.protocol:
        told = ("--reason", plugin.protocol, "--report", str(report))
        session.run("polydraft-conformance", "protocol", backend, *told)
        return
    for name, quick in ((backend, plugin.options), *plugin.further):
        options = plugin.full if EVERYTHING in os.environ else quick
        where = ("--polydraft-backend", name, "--polydraft-must-run", "--polydraft-report", str(REPORTS / name))
        chosen = session.posargs if session.posargs and name == backend else options
        pytest(session, "--pyargs", "polydraft_conformance", "-n", workers, *where, *chosen)
    over_workers = plugin.options if EVERYTHING in os.environ else plugin.workers
    if over_workers and not session.posargs:
        # Without a report: its rows would be those of the backend once more.
        where = ("--polydraft-backend", backend, "--polydraft-must-run", "--polydraft-isolation", "process")
        pytest(session, "--pyargs", "polydraft_conformance", "-n", workers, *where, *over_workers)


def workers_here() -> str:
    """How many processes a session may run its checks in: all cores if it runs alone, at most one for each target."""
    import lanes

    return os.environ.get(lanes.WORKERS) or str(min(lanes.usable_cores(), 4))


@nox.session
def report(session: nox.Session) -> None:
    """One HTML page and one Markdown table of all results in conformance-reports/."""
    if not any(REPORTS.rglob("conformance-report.json")):
        session.error(f'{REPORTS.name}/ holds no report yet. Make one: nox -s "conformance(reference)"')
    install(session, *folders(CORE, CONFORMANCE))
    page, table = str(REPORTS / "index.html"), str(REPORTS / "matrix.md")
    session.run("polydraft-conformance", "report", str(REPORTS), "--html", page, "--matrix", table, *session.posargs)


@nox.session
@nox.parametrize("backend", [nox.param("vllm", id="vllm")])
def long(session: nox.Session, backend: str) -> None:
    """Tests that take too long for every run: minutes of load, several workers, killed processes."""
    plugin = BACKENDS[backend]
    install_engine(session, plugin)
    install(session, "ray[data]", constraints=plugin.constraints)
    pytest(session, "-s", f"{plugin.folder}/long_tests", *session.posargs)


@nox.session
def kernels(session: nox.Session) -> None:
    """The Transformers plugin's Triton kernels against their definitions, without a GPU: in Triton's interpreter."""
    if sys.platform != "linux":
        session.skip("Triton has packages for Linux only")
    prepare(session)
    folder = BACKENDS["transformers"].folder
    install(session, "pytest", "pytest-xdist", "triton", *folders(CORE, PAIRS, folder))
    # Of the tests of rounds those that run them on kernels.
    names = ("fused_layers", "prompt_attention", "step_attention", "step_choice", "step_experts", "step_products")
    chosen = (*(f"{folder}/tests/test_{name}.py" for name in (*names, "device_rounds")), "-k", "not rounds or kernels")
    session.env["TRITON_INTERPRET"] = "1"
    pytest(session, "-n", workers_here(), *chosen, *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """mlx-vlm's own speculative decoding, which `polydraft bench --against upstream` runs beside MLX's."""
    plugin = BACKENDS["mlx"]
    install_engine(session, plugin)
    install(session, "mlx-vlm==0.7.10", constraints=plugin.constraints)
    pytest(session, f"{plugin.folder}/tests/test_mlx_upstream.py", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The server's page in a headless Chromium: playwright's, or else the system's; without one, its tests are skipped.

    ``playwright install chromium`` brings one. POLYDRAFT_CHROMIUM names another.
    """
    prepare(session)
    needed = folders(CORE, PAIRS, BACKENDS["reference"].folder, f"{SERVER}[test]")
    install(session, "playwright", "axe-playwright-python", *needed)
    pytest(session, f"{SERVER}/tests/browser", *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """Clients that people use, against the server."""
    prepare(session)
    needed = folders(CORE, PAIRS, BACKENDS["reference"].folder, f"{SERVER}[test]")
    install(session, "litellm", "langchain-openai", "llm", *needed)
    # A program, with versions of its own.
    elsewhere = Path(session.create_tmp()).resolve() / "aiperf"
    session.run(sys.executable, "-m", "virtualenv", "--quiet", str(elsewhere), external=True)
    programs = elsewhere / ("Scripts" if sys.platform == "win32" else "bin")
    session.run(str(programs / "pip"), "install", "--quiet", "--no-compile", "aiperf==0.13.0", external=True)
    session.env["POLYDRAFT_AIPERF"] = str(programs / "aiperf")
    pytest(session, f"{SERVER}/tests/clients", *session.posargs)


@nox.session
def adapters(session: nox.Session) -> None:
    """polydraft as a model of `llm` and of LangChain, in those programs."""
    prepare(session)
    install(session, "pytest", *folders(CORE, PAIRS, BACKENDS["reference"].folder, *ADAPTERS))
    pytest(session, *(f"{folder}/tests" for folder in ADAPTERS), *session.posargs)


@nox.session
def batches(session: nox.Session) -> None:
    """Batches on two Ray nodes of this machine, one of which is killed."""
    prepare(session)
    needed = folders(CORE, PAIRS, BACKENDS["reference"].folder, f"{SERVER}[ray,test]")
    install(session, "psutil", *needed)
    pytest(session, "-s", f"{SERVER}/long_tests", *session.posargs)


@nox.session
def load(session: nox.Session) -> None:
    """64 clients of the server for five minutes, some of them badly behaved; its engine is killed in the middle."""
    prepare(session)
    install(session, *folders(CORE, PAIRS, BACKENDS["reference"].folder, SERVER))
    session.run("python", f"{SERVER}/long_tests/load.py", *session.posargs)


@nox.session
def litertlm(session: nox.Session) -> None:
    """Convert the built-in pair for LiteRT-LM anew, with 3 GB of converters; what is checked in is replaced."""
    folder = f"{BACKENDS['litert_lm'].folder}/pair"
    session.install("--quiet", "-r", f"{folder}/requirements.txt")
    session.run("python", f"{folder}/make.py", *session.posargs)


@nox.session
def readme(session: nox.Session) -> None:
    """Write the README's table of speeds from a benchmark, and the table of backends from their declarations."""
    install(session, *folders(CORE))
    install(session, "--no-deps", *folders(GGUF, *(backend.folder for backend in BACKENDS.values())))
    session.run("python", "ci/readme.py", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build all wheels, install ``polydraft[transformers,builtin]`` from them in an empty environment, and generate."""
    with installed_elsewhere(session, DISTRIBUTIONS, "polydraft[transformers,builtin]") as programs:
        program = str(programs / "polydraft")
        session.run(program, "doctor", external=True)
        greedy = ["--prompt", DEMO_PROMPT, "--max-new-tokens", "40", "--dtype", "float32"]
        session.run(program, "generate", "--compare", *greedy, external=True)


@nox.session
def dist(session: nox.Session) -> None:
    """Build the source archive and the wheel of every distribution into dist/, for a release (RELEASING.md)."""
    build_all(session)


@nox.session(name="release-check")
def release_check(session: nox.Session) -> None:
    """Whether dist/ can be released: metadata, each extra in an empty environment with an old pip, commands of hints.

    ``-- --only server,hints`` checks only these.
    """
    prepare(session)
    build_all(session)
    install(session, "packaging", "trove-classifiers")
    session.run("python", "ci/release.py", "dist", *session.posargs)


def build_all(session: nox.Session) -> None:
    """Build the source archive of every distribution, and from it the wheel, into dist/."""
    install(session, "build", "hatchling", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for folder in DISTRIBUTIONS:
        # As in `install`: one environment for all builds.
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", folder)
    session.run("twine", "check", "--strict", *(str(path) for path in sorted((ROOT / "dist").iterdir())))


@nox.session
def third_party(session: nox.Session) -> None:
    """Check the example of a third-party plugin as its author would: from wheels, outside the repository.

    Only the core, the suite and the plugin are installed. Reports go to conformance-reports/<backend>.
    """
    with installed_elsewhere(session, (CORE, CONFORMANCE, EXAMPLE_PLUGIN), "polydraft-markov[test]") as programs:
        session.run(str(programs / "polydraft-conformance"), "imports", "polydraft_markov", external=True)
        tests = shutil.copytree(ROOT / EXAMPLE_PLUGIN / "tests", "tests")
        session.run(str(programs / "pytest"), "-q", str(tests), external=True)
        shutil.copytree("conformance-reports", REPORTS, dirs_exist_ok=True)


@contextmanager
def installed_elsewhere(session: nox.Session, names: Sequence[str], requirement: str) -> Iterator[Path]:
    """Build the wheels of ``names``, and install a requirement from them in an empty environment.

    The ``with`` block runs in a folder outside the repository, and gets the folder of the environment's programs.
    """
    prepare(session)
    dist = (Path(session.create_tmp()) / "dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist), *folders(*names))
    built = sorted(dist.glob("*.whl"))
    if len(built) != len(names):
        session.error(f"{len(names)} distributions gave {len(built)} wheels")
    with tempfile.TemporaryDirectory(prefix="polydraft-wheels-") as folder:
        elsewhere = Path(folder)
        # Pinned by file, since an index might have another distribution of the same name.
        pins = elsewhere / "wheels.txt"
        lines = [f"{wheel.name.split('-')[0].replace('_', '-')} @ {wheel.as_uri()}" for wheel in built]
        pins.write_text("\n".join(lines) + "\n", encoding="utf-8")
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(elsewhere / "env"), external=True)
        programs = elsewhere / "env" / ("Scripts" if sys.platform == "win32" else "bin")
        with session.chdir(elsewhere):
            pinned = ["--find-links", str(dist), "-c", str(pins), "-c", str(CONSTRAINTS)]
            pip = str(programs / "pip")
            session.run(pip, "install", "--quiet", "--no-compile", *pinned, requirement, external=True)
            yield programs
