"""Making an environment: step by step beside the one in use, tested, and only then put in its place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import Any, Literal

from packaging.utils import canonicalize_name

from polydraft._environments.child import ANSWER
from polydraft._environments.credentials import in_a_file, in_a_netrc
from polydraft._environments.failures import explained, no_space
from polydraft._environments.interpreters import interpreter_for
from polydraft._environments.plan import InstallPlan, check_disk, engine_named, plan_digest, plan_for
from polydraft._environments.progress import Progress
from polydraft._environments.records import Environment, SelfTest, Source
from polydraft._environments.runner import CommandFailedError, child_environ, run
from polydraft._environments.sources import requirements
from polydraft._environments.store import (
    FORMAT,
    activate,
    all_environments,
    clear_unused,
    engine_folder,
    environments,
    locked,
    new_build,
    remove,
    written,
)
from polydraft._environments.tools import Pip, python_of, uv_here
from polydraft._probes.asking import ask
from polydraft._probes.interpreter import command_of
from polydraft._probes.records import CataloguedBackend, PluginCatalogue
from polydraft._registry.engines import Accelerator, Step
from polydraft.contract.records import CONTRACT_VERSION, Record
from polydraft.errors import EnvironmentSetupError
from polydraft.files import read_json
from polydraft.hardware import cpu_model

__all__ = ["install", "remove_engine", "update"]

_ASKING = 120.0
"""Seconds that each backend of a new environment may take to tell its state, with the first import of its engine."""
_FLAGS = ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS")
"""Variables with which a package compiles to something else."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


def install(
    name: str,
    progress: Progress,
    *,
    accelerator: str = "auto",
    source: str | Source | None = None,
    python: str | None = None,
    packages: tuple[str, ...] = (),
    again: bool = False,
) -> tuple[Environment, bool]:
    """Install an engine into an environment of its own.

    Args:
        name: The engine.
        progress: Is told what happens.
        accelerator: As ``plan_for``; so are ``source``, ``python`` and ``packages``.
        source: Where polydraft comes from.
        python: The interpreter.
        packages: Another author's plugin.
        again: Make the environment anew even if the same one is there.

    Returns:
        The environment, and whether it was made now.

    Raises:
        InvalidRequestError: There is no such engine.
        EnvironmentSetupError: It cannot be installed. An environment that was there before is still in use.
        SystemResourceError: The disk is full or fails, and so on.
    """
    plan = plan_for(name, accelerator=accelerator, source=source, python=python, packages=packages, check_space=False)
    engine = plan.engine.name
    with locked(engine, lambda: progress.note(f"Another process changes the environment of {engine}: waiting for it.")):
        clear_unused(engine)  # of an installation that was killed: it may be what fills the disk
        there = environments().get(engine)
        if there is not None and not again and not plan.differs_from(there):
            return there, False
        check_disk(plan)
        return _make(plan, progress), True


def update(name: str, progress: Progress, *, again: bool = False) -> tuple[Environment, bool]:
    """Make an engine's environment anew, as it was made, if anything else would result now.

    Args:
        name: The engine.
        progress: Is told what happens.
        again: Make it anew in any case.

    Returns:
        The environment, and whether it was made now.

    Raises:
        EnvironmentSetupError: It is not installed, or cannot be made. The one that was there before is still in use.
    """
    there = all_environments().get(name)
    if there is None:
        raise EnvironmentSetupError(f"{name} is not installed.", f"Install it: `polydraft engines install {name}`.")
    made = _as_it_was(name)
    engine = engine_named(name, made.packages)
    source, python = made.source, made.python_wanted or None
    # What cannot be had again is chosen anew, since `update` has no options for it.
    if source is not None:
        try:
            requirements(source, engine, made.packages)
        except EnvironmentSetupError as error:
            progress.note(f"{error.message} It is installed from where this polydraft came from.")
            source = None
    if python is not None:
        try:
            interpreter_for(engine, python, uv_here())
        except EnvironmentSetupError as error:
            progress.note(f"{error.message} Another Python is taken.")
            python = None
    return install(
        name,
        progress,
        accelerator=made.accelerator,
        source=source,
        python=python,
        packages=made.packages,
        again=again,
    )


class _Made(Record):
    """What an environment was made for and of."""

    accelerator: Accelerator | Literal["auto"] = "auto"
    packages: tuple[str, ...] = ()
    python_wanted: str = ""
    source: Source | None = None


def _as_it_was(name: str) -> _Made:
    """What is known of an environment, perhaps of another version of polydraft; a damaged state says nothing."""
    try:
        told = read_json(engine_folder(name) / "state.json")
        return _Made.model_validate({field: told[field] for field in _Made.model_fields})
    except (OSError, ValueError, TypeError, KeyError):
        return _Made()


def remove_engine(name: str, progress: Progress) -> bool:
    """Remove an engine's environment; False if there is none.

    Raises:
        EnvironmentSetupError: A process uses it, or it cannot be removed.
    """
    with locked(name, lambda: progress.note(f"Another process changes the environment of {name}: waiting for it.")):
        return remove(name)


class _Making:
    """One environment while it is made."""

    def __init__(self, plan: InstallPlan, progress: Progress, number: int, folder: Path) -> None:
        self.plan, self.progress, self.number, self.folder = plan, progress, number, folder
        self.python = python_of(folder)
        self.home = engine_folder(plan.engine.name)
        self.log = self.home / "install.log"
        self.constraints = self.home / "constraints.txt"

    def run(self, doing: str, command: Sequence[str], *, given: str | None = None, **further: str) -> list[str]:
        """Run a command, and tell its output if nothing is given to it; its failure is explained."""
        environ = child_environ(self.python, **self.plan.tool.environ, TMPDIR=str(self.home / "tmp"), **further)
        try:
            return run(
                command,
                log=self.log,
                folder=self.home,
                environ=environ,
                heard=self.progress.line if given is None else lambda line: None,
                given=given or "",
            )
        except CommandFailedError as failed:
            raise explained(self.plan.engine.name, doing, failed, self.home, self.log) from failed

    def answer(self, doing: str, request: dict[str, Any]) -> dict[str, Any]:
        """Ask ``child`` in the new environment."""
        command = command_of(self.python, "polydraft._environments.child")
        output = self.run(doing, command, given=json.dumps(request))
        line = next((line for line in reversed(output) if line.startswith(ANSWER)), "")
        if not line:
            raise self.error(f"{doing} gave no answer", "Report it with the log.")
        found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
        return found

    def error(self, what: str, hint: str) -> EnvironmentSetupError:
        name = self.plan.engine.name
        return EnvironmentSetupError(
            f"{name} could not be installed: {what}.", f"{hint} The log is {self.log}.", log=self.log
        )


def _make(plan: InstallPlan, progress: Progress) -> Environment:
    """Make an environment and put it in the place of the one before."""
    name = plan.engine.name
    with written(name):
        number, folder = new_build(name)
        making = _Making(plan, progress, number, folder)
        (making.home / "tmp").mkdir(mode=0o700, exist_ok=True)
        making.log.write_text(f"polydraft {version('polydraft')}, {datetime.now(UTC).isoformat()}\n", encoding="utf-8")
        constraints = (f"{one}=={pin}\n" for one, pin in plan.constraints.items())
        making.constraints.write_text("".join(constraints), encoding="utf-8")
    try:
        progress.note(
            f"Installing {name} for {plan.variant.accelerator} into {folder}, with {plan.tool.name} and "
            f"Python {plan.interpreter.version}, polydraft from {plan.source}."
        )
        if plan.interpreter.note:
            progress.note(plan.interpreter.note)
        environment = _filled(making)
        with written(name):
            activate(environment)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise no_space(name, making.home, making.log) from error
        raise
    finally:
        shutil.rmtree(making.home / "tmp", ignore_errors=True)
    clear_unused(name)
    return environment


def _filled(making: _Making) -> Environment:
    """Run all steps, test what came out, and describe it."""
    plan, tool, progress = making.plan, making.plan.tool, making.progress
    steps = plan.variant.all_steps()
    count, compiles = len(steps) + 3, any(step.compile for step in steps)
    progress.step(1, count, "Making the environment")
    making.run("making the environment", tool.make(making.folder, plan.interpreter.program, compiles=compiles))
    for number, step in enumerate(steps, 2):
        progress.step(number, count, _title(step))
        _run_step(making, step)
    progress.step(count - 1, count, "Looking at what it offers")
    catalogue, mine = _catalogue(making)
    versions, proofs = _contents(making.folder, {"polydraft", *(name for one in mine for name in _parts(one))})
    progress.step(count, count, "Testing it: decoding with speculation and plainly")
    tests = [_self_test(making, backend, target) for backend, target in _self_tests(plan, catalogue, mine)]
    notes = []
    if plan.variant.accelerator != "cpu" and tests and all(test.device.startswith("cpu") for test in tests):
        notes.append(
            f"It was installed for {plan.variant.accelerator}, but runs on the processor: the build may not fit this "
            "machine's driver."
        )
    for note in notes:
        progress.note(note)
    return Environment(
        format=FORMAT,
        name=plan.engine.name,
        build=making.number,
        folder=making.folder,
        python=making.python,
        python_version=catalogue.python,
        python_wanted=plan.python_wanted,
        accelerator=plan.variant.accelerator,
        packages=plan.packages,
        source=plan.source,
        stamp=plan.stamp,
        plan=plan_digest(plan.engine, plan.variant),
        polydraft=catalogue.polydraft,
        contract_version=catalogue.contract_version,
        versions=versions,
        proofs=proofs,
        catalogue=catalogue,
        self_tests=tuple(tests),
        notes=tuple(notes),
        bytes=_size(making.folder),
        installed=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _parts(backend: CataloguedBackend) -> list[str]:
    """The distributions of a backend's plugin and engine."""
    return [*([backend.distribution] if backend.distribution else []), *backend.versions]


def _contents(folder: Path, parts: set[str]) -> tuple[dict[str, str], tuple[Path, ...]]:
    """All distributions of an environment with their versions, and paths that are there as long as ``parts`` are."""
    places = [*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")]
    wanted = {canonicalize_name(name) for name in parts}
    versions, proofs = dict[str, str](), list[Path]()
    for place in places:
        for path in place.glob("*.dist-info"):
            found = Distribution.at(path)
            name = canonicalize_name(found.metadata["Name"])
            versions[name] = found.version
            proofs += [path] if name in wanted else []
    return versions, (*places, *proofs)


def _title(step: Step) -> str:
    if step.plugin:
        return "Installing polydraft and its plugin"
    if step.compile:
        return f"Compiling {', '.join(step.compile)} for this processor, which takes minutes"
    return f"Removing {', '.join(step.remove)}" if step.remove else f"Installing {', '.join(step.install)}"


def _run_step(making: _Making, step: Step) -> None:
    plan, tool = making.plan, making.plan.tool

    def put(what: Sequence[str], doing: str, *, indexes: Sequence[str] = (), wheels: Sequence[Path] = ()) -> None:
        folders = [*wheels, *([plan.source.folder] if plan.source.kind == "wheels" and plan.source.folder else [])]
        command = tool.install(making.python, [*what], making.constraints, indexes=[*indexes], wheels=folders)
        secret = making.home / "tmp"
        further = in_a_netrc(making.python, secret) if isinstance(tool, Pip) else {}
        making.run(doing, in_a_file(command, secret), **further)

    if step.plugin:
        put(plan.requirements, "installing polydraft and its plugin")
    elif step.remove:
        making.run(f"removing {', '.join(step.remove)}", tool.remove(making.python, [*step.remove]))
    elif step.compile:
        for package in step.compile:
            wheels = _compiled(making, package, step)
            pin = f"{package}=={plan.constraints[package]}"
            put(["--only-binary", package, pin], f"installing {package}", wheels=[wheels])
    else:
        what = [_pinned(one, step.build, plan.constraints) for one in step.install]
        doing = f"installing {', '.join(what)}"
        try:
            put(what, doing)
        except EnvironmentSetupError as error:
            # Only where the user's own indexes do not have that build: they may be private ones that are to be used.
            if not step.index or "has no" not in error.message:
                raise
            making.progress.note(f"Your package indexes have no {', '.join(what)}: {step.index} is asked, too.")
            put(what, doing, indexes=[step.index])


def _pinned(requirement: str, build: str, constraints: dict[str, str]) -> str:
    """A requirement, with the local version that its build has: ``torch==2.13.0+cpu``."""
    return f"{requirement}=={constraints[canonicalize_name(requirement)]}+{build}" if build else requirement


def _compiled(making: _Making, package: str, step: Step) -> Path:
    """The folder of a package's wheel, compiled for this processor, Python and accelerator unless it is there.

    Not in pip's cache: that knows name and version alone, and a wheel of another processor, which shares the home
    folder, or without an accelerator, would be taken for this one.
    """
    plan = making.plan
    flags = {name: os.environ.get(name, step.environment.get(name, "")) for name in {*_FLAGS, *step.environment}}
    kind = (cpu_model(), platform.libc_ver(), plan.interpreter.version, plan.variant.accelerator, sorted(flags.items()))
    folder = making.home / "wheels" / hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:16]
    pin = f"{package}=={plan.constraints[package]}"
    if not any(folder.glob("*.whl")):
        with written(plan.engine.name):
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=making.home / "tmp"))
        command = [
            str(making.python),
            "-I",
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-cache-dir",
            "--progress-bar",
            "off",
        ]
        set_here = {name: value for name, value in flags.items() if value}
        set_here |= in_a_netrc(making.python, making.home / "tmp")
        making.run(f"compiling {package}", [*command, "--wheel-dir", str(draft), pin], **set_here)
        with written(plan.engine.name):
            draft.rename(folder)
    return folder


def _catalogue(making: _Making) -> tuple[PluginCatalogue, list[CataloguedBackend]]:
    """What the plugins in the new environment offer, and the backends of the one that was installed."""
    plan = making.plan
    (answer,) = ask(making.python, None, seconds=_ASKING, want="catalogue")
    catalogue = answer.catalogue
    if catalogue is None:
        raise making.error(f"its plugins cannot be asked, the process {answer.problem.rstrip('.')}", "Report it.")
    if reason := catalogue.broken.get(plan.engine.name):
        raise making.error(f"its plugin is broken: {reason.rstrip('.')}", "Report it to the plugin's author.")
    if catalogue.contract_version != CONTRACT_VERSION or catalogue.polydraft != version("polydraft"):
        raise making.error(
            f"it has polydraft {catalogue.polydraft}, and {version('polydraft')} runs here",
            "Install it from where this polydraft came from: `--from DIR`.",
        )
    mine = [one for one in catalogue.backends if one.plugin == plan.engine.name]
    if not mine:
        there = sorted({one.plugin for one in catalogue.backends})
        raise making.error(
            f"there is no plugin {plan.engine.name} in it",
            f"Its plugins are: {', '.join(there)}; install it by that name." if there else "Check the package.",
        )
    usable = [one for one in mine if one.state is not None and one.state.usable]
    if not usable:
        why = " ".join(f"{one.record.name}: {one.state.problem} {one.state.remedy}" for one in mine if one.state)
        raise making.error(f"none of its backends is usable: {why.rstrip('.')}", "Report it.")
    return catalogue, mine


def _self_tests(plan: InstallPlan, catalogue: PluginCatalogue, mine: list[CataloguedBackend]) -> list[tuple[str, str]]:
    """The backends to test, each with a model: the registry's, else one that the plugin brings along."""
    if plan.engine.self_test:
        return list(plan.engine.self_test.items())
    local = {f"builtin:{model.name}": model.format for model in catalogue.local_models}
    own = [pair.target for plugin, pair in catalogue.pairs if plugin == plan.engine.name]
    return [
        (one.record.name, target)
        for one in mine
        if one.state is not None and one.state.usable and one.state.diagnosis and one.state.diagnosis.rank
        for target in [next((target for target in own if local.get(target) in one.record.formats), "")]
        if target
    ]


def _self_test(making: _Making, backend: str, target: str) -> SelfTest:
    doing = f"testing {backend}"
    # float32: in 16 bits a near tie may flip. Another author's engine may not have it.
    dtype = "auto" if making.plan.packages else "float32"
    found = making.answer(doing, {"backend": backend, "target": target, "dtype": dtype})
    speculative, plain = found["tokens"]
    if speculative != plain or not speculative:
        raise making.error(
            f"{backend} decodes {target} to other tokens with speculation than plainly", "Report it with the log."
        )
    return SelfTest(
        backend=backend,
        target=target,
        device=found["device"],
        tokens=len(plain),
        acceptance_rate=found["acceptance_rate"],
        seconds=found["seconds"],
    )


def _size(folder: Path) -> int:
    """Bytes of all files, links not followed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118 - tens of thousands of files
    return total
