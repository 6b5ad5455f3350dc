"""What computes, beyond version numbers: the builds of distributions, and the code of polydraft and of the plugin.

``python -m polydraft.verification._builds`` tells it of another interpreter's environment: a request as JSON on
standard input, the answer on standard output. No engine is imported there.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft._registry.versions import installed_version
from polydraft.checkpoints.contents import content_digest, file_digest, files_below
from polydraft.errors import EngineError, ModelFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from importlib.metadata import Distribution

__all__ = ["builds_here", "builds_in", "code_digest", "distribution_builds"]

_CODE = {".py", ".so", ".dylib", ".dll", ".pyd"}
_SLACK = 5.0
"""Seconds that an installation may take after its list was written."""
_LIMIT = 120.0
"""Seconds for reading the changed files of an environment."""

Builds = tuple[dict[str, str], dict[str, str]]
"""Versions of the installed ones among some distributions, and the builds of these and of packages' code."""


def builds_here(names: Iterable[str], packages: Iterable[str]) -> Builds:
    """What this process's environment has of these distributions, and the code of these packages.

    Raises:
        ModelFormatError: A file that was changed cannot be read.
    """
    names = sorted(names)
    codes = {f"the code of {package}": code_digest(package) for package in sorted(packages)}
    versions = {name: version for name in names if (version := installed_version(name))}
    return versions, {**distribution_builds(names), **codes}


def builds_in(python: Path, names: Iterable[str], packages: Iterable[str]) -> Builds:
    """The same of another interpreter's environment.

    Raises:
        EngineError: It does not tell.
    """
    asked = json.dumps({"names": sorted(names), "packages": sorted(packages)})
    command = [str(python), "-I", "-m", "polydraft.verification._builds"]
    try:
        told = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_LIMIT, check=True).stdout
        versions, builds = json.loads(told)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = getattr(error, "stderr", "") or str(error)
        last = said.strip().rpartition("\n")[2].rstrip(".")
        raise EngineError(
            f"{python} does not tell what is installed in its environment: {last}.",
            "`polydraft engines list` shows whether the environment is whole.",
        ) from error
    return versions, builds


def code_digest(package: str) -> str:
    """A hash over the Python files of a package (or module) as they are now; empty where they cannot be found.

    So an installation that is edited in place, or a working tree, is another one after each edit.
    """
    try:
        spec = find_spec(package)
    except ValueError:  # of a module that was not imported from a file, as in a notebook
        spec = None
    if spec is None:
        return ""
    if not spec.submodule_search_locations:
        return content_digest({"module": Path(spec.origin)}) if spec.origin and Path(spec.origin).is_file() else ""
    return content_digest(
        {
            f"{number}/{path.relative_to(folder).as_posix()}": path
            for number, folder in enumerate(map(Path, spec.submodule_search_locations))
            for path in files_below(folder)
            if path.suffix == ".py"
        }
    )


def distribution_builds(names: Iterable[str]) -> dict[str, str]:
    """The build of each installed distribution: a hash over the hashes of its code, as installers record them.

    Two builds of one version differ in it, such as one compiled here and one for another device. So does one that was
    edited in place: files that changed after the installation are read. Distributions without such a list are left out.

    Raises:
        ModelFormatError: A file that was changed cannot be read.
    """
    found = {}
    for name in names:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        record = installed.read_text("RECORD") or ""
        # Without what depends on the place of the installation: scripts, and the distribution's own metadata.
        hashes = {
            row[0]: row[1]
            for row in csv.reader(record.splitlines())
            if len(row) == 3 and row[1] and not row[0].startswith("..") and ".dist-info/" not in row[0]
        }
        if hashes:
            hashes |= _changed(installed, hashes)
            listed = "\n".join(f"{file} {digest}" for file, digest in sorted(hashes.items()))
            found[name] = f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
    return found


def _changed(installed: Distribution, hashes: Mapping[str, str]) -> dict[str, str]:
    """The code files of a distribution that are not as they were installed, with what they hold now."""
    root = Path(str(installed.locate_file("")))
    records = list(root.glob(f"{installed.metadata['Name'].replace('-', '_')}-*.dist-info/RECORD"))
    # An installer writes the list last; where there is not exactly one, every file is read.
    since = records[0].stat().st_ctime + _SLACK if len(records) == 1 else 0.0
    found = {}
    for name, recorded in hashes.items():
        path = root / name
        if path.suffix not in _CODE and ".so." not in path.name:
            continue
        try:
            status = path.stat()
            if max(status.st_ctime, status.st_mtime) <= since:
                continue
            digest = file_digest(path)
        except FileNotFoundError:
            found[name] = "missing"
            continue
        except OSError as error:
            raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.", "Install it again.") from error
        # ``sha256=`` and the digest in URL-safe base64 without padding (PEP 376).
        as_recorded = base64.urlsafe_b64encode(bytes.fromhex(digest)).rstrip(b"=").decode()
        if recorded != f"sha256={as_recorded}":
            found[name] = digest
    return found


if __name__ == "__main__":
    request = json.load(sys.stdin)
    json.dump(builds_here(request["names"], request["packages"]), sys.stdout)
