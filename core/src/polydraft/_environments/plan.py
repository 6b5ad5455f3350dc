"""What an installation will do: decided, and checked as far as that costs nothing, before anything is changed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from polydraft._environments.failures import no_space
from polydraft._environments.interpreters import Interpreter, interpreter_for
from polydraft._environments.machine import lacking, variant_for
from polydraft._environments.records import Environment, Source
from polydraft._environments.sources import given_source, own_source, requirements, stamp
from polydraft._environments.store import all_environments
from polydraft._environments.tools import Pip, Uv, tool_here, uv_here
from polydraft._folders import data_folder
from polydraft._origin import CORE
from polydraft._presentable import presentable
from polydraft._registry.backends import known_backends
from polydraft._registry.engines import (
    KnownEngine,
    Variant,
    engine_of,
    is_engine_name,
    known_engines,
    pinned_versions,
)
from polydraft.checkpoints._names import did_you_mean
from polydraft.errors import InvalidRequestError

__all__ = ["InstallPlan", "check_disk", "engine_name", "engine_named", "of_other_version", "plan_digest", "plan_for"]


_SHOWN_BY_GIT = re.compile(r"\b(git|hg|svn|bzr)\+https?://[^/?#\s]*@")
"""A URL with a user or password that a version control program is started with."""


@dataclass(frozen=True)
class InstallPlan:
    """A checked installation."""

    engine: KnownEngine
    variant: Variant
    packages: tuple[str, ...]
    source: Source
    requirements: tuple[str, ...]
    """polydraft, the plugin and the built-in pairs, as pip's arguments."""
    interpreter: Interpreter
    python_wanted: str
    """The Python that the user named; empty: none."""
    tool: Pip | Uv
    constraints: dict[str, str]
    """Distribution -> version."""

    @property
    def stamp(self) -> str:
        """Changes with the files that are copied."""
        return stamp(self.source, self.engine)

    def differs_from(self, environment: Environment) -> str:
        """Why another environment than the given one would result, one sentence; empty if the same would."""
        if reason := of_other_version(environment):
            return reason
        if environment.accelerator != self.variant.accelerator:
            return f"It was made for {environment.accelerator}, and is to be for {self.variant.accelerator}."
        if environment.source != self.source:
            return f"It was installed from {environment.source}, and is to be from {self.source}."
        if environment.packages != self.packages:
            return f"It was made of {presentable(', '.join(environment.packages)) or 'polydraft own plugin'}."
        if self.python_wanted and not environment.python_version.startswith(self.interpreter.version):
            return f"It has Python {environment.python_version}, and is to have {self.interpreter.version}."
        if environment.plan != plan_digest(self.engine, self.variant):
            return "polydraft installs other versions now."
        if environment.stamp != self.stamp:
            return f"{str(self.source)[:1].upper()}{str(self.source)[1:]} has changed."
        return ""


def engine_named(name: str, packages: tuple[str, ...] = ()) -> KnownEngine:
    """The engine of that name, or the one that brings a backend of that name or alias.

    Args:
        name: The name.
        packages: Requirements that bring a plugin of that name which polydraft does not know.

    Raises:
        InvalidRequestError: There is none.
    """
    if packages:
        if not is_engine_name(name):
            raise InvalidRequestError(
                f"{name!r} cannot be a plugin's name.",
                "It begins with a letter or a digit; letters, digits, `_`, `.` and `-` follow.",
            )
        for package in packages:
            if _SHOWN_BY_GIT.search(package):
                raise InvalidRequestError(
                    f"{presentable(package)} holds a password, and git shows it to other users of the machine.",
                    "Leave it out of the URL: git asks its credential helper (`git help credentials`), or use ssh.",
                )
            if not Path(package).expanduser().exists():
                try:
                    Requirement(package)
                except InvalidRequirement as error:
                    raise InvalidRequestError(
                        f"{package} is neither a folder, a file nor a requirement.",
                        "Write it as pip takes it: `name`, `name==1.0` or a path.",
                    ) from error
        anything = Variant(accelerator="cpu", disk_mb=1000, minutes=5)
        ways = tuple(anything.model_copy(update={"accelerator": one}) for one in ("cpu", "cuda", "metal"))
        return KnownEngine(name=name, distribution="", variant=ways)
    known = known_engines()
    wanted = name.lower().replace("-", "_")
    if wanted in known:
        return known[wanted]
    for backend in known_backends():
        if name.lower() in {backend.name, *backend.aliases} and (engine := engine_of(backend.name)):
            return engine
    distributions = {engine.distribution: engine for engine in known.values()}
    if canonicalize_name(name) in distributions:
        return distributions[canonicalize_name(name)]
    raise InvalidRequestError(
        f"polydraft knows no engine {name!r}.",
        f"{did_you_mean(name, [*known])} It knows {', '.join(known)}; for another author's plugin, give `--package`, "
        "too.".strip(),
    )


def of_other_version(environment: Environment) -> str:
    """That an environment has another version of polydraft than this one, one sentence; empty if it has not."""
    mine = version(CORE)
    return f"It has polydraft {environment.polydraft}, and {mine} runs here." if environment.polydraft != mine else ""


def engine_name(name: str) -> str:
    """The name of an engine that is known or installed, from its own or one of its backends'.

    Raises:
        InvalidRequestError: There is none.
    """
    return name if name in all_environments() else engine_named(name).name


def plan_digest(engine: KnownEngine, variant: Variant) -> str:
    """Changes when the registry installs something else."""
    chosen = [engine.model_dump(exclude={"variants", "self_test"}), variant.model_dump(exclude={"disk_mb", "minutes"})]
    text = json.dumps([*chosen, pinned_versions(engine.tested)], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_for(
    name: str,
    *,
    accelerator: str = "auto",
    source: str | Source | None = None,
    python: str | None = None,
    packages: tuple[str, ...] = (),
    check_space: bool = True,
) -> InstallPlan:
    """Decide how an engine is installed here. Nothing is changed, and the network is not used.

    Args:
        name: The engine.
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``metal``.
        source: A clone, a folder of wheels or ``index``; None: where the running polydraft came from.
        python: A path or a version; None: this process's if it fits.
        packages: Requirements of a plugin that polydraft does not know.
        check_space: Whether too little space on the disk is an error.

    Raises:
        InvalidRequestError: There is no such engine.
        EnvironmentSetupError: It cannot be installed here, or not like this.
    """
    engine = engine_named(name, packages)
    variant = variant_for(engine, accelerator)
    if error := lacking(engine, variant):
        raise error
    interpreter = interpreter_for(engine, python, uv_here())
    if source is None:
        source = own_source(engine)
    elif isinstance(source, str):
        source = given_source(source)
    absolute = tuple(
        str(Path(one).expanduser().absolute()) if Path(one).expanduser().exists() else one for one in packages
    )
    plan = InstallPlan(
        engine=engine,
        variant=variant,
        packages=absolute,
        source=source,
        requirements=tuple(requirements(source, engine, absolute)),
        interpreter=interpreter,
        python_wanted=python or "",
        tool=tool_here(),
        constraints=pinned_versions(engine.tested),
    )
    if check_space:
        check_disk(plan)
    return plan


def check_disk(plan: InstallPlan) -> None:
    """Refuse an installation for which there is certainly too little space.

    Raises:
        EnvironmentSetupError: There is.
    """
    folder = data_folder()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError:  # a file system that does not tell
        return
    needed = plan.variant.disk_mb * 10**6
    if free < needed:
        raise no_space(
            plan.engine.name,
            folder,
            None,
            f"{plan.engine.name} needs about {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free",
        )
