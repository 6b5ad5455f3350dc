"""The one version of all distributions: ``python ci/version.py`` checks it, ``python ci/version.py 0.2.0`` sets it.

The core's pyproject.toml defines it. These must agree: the version of every other distribution and of the example
plugin; constants named ``VERSION`` or ``__version__``; requirements of the form ``polydraft>=0.1,<0.2``, also in the
plugin guide; and the changelog, whose newest release must not be newer. Setting a version dates the changelog's
unreleased part. The version of the plugin contract is independent, and is not touched.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
_VERSION = r"\d+\.\d+\.\d+"
_STATED = re.compile(rf'^((?:version|VERSION|__version__) = "){_VERSION}"', re.MULTILINE)
_REQUIRED = re.compile(r"(\bpolydraft(?:-[a-z-]+)?(?:\[[\w,-]+\])?)>=[\d.]+,<[\d.]+")
_UNRELEASED = "## [Unreleased]\n"
_RELEASE = re.compile(rf"^## \[({_VERSION})\]", re.MULTILINE)


def required(version: str) -> str:
    """The range of compatible versions: one minor release before 1.0, one major release after it."""
    major, minor, _ = (int(part) for part in version.split("."))
    return f">={major}.{minor},<{major + 1}" if major else f">=0.{minor},<0.{minor + 1}"


def current(root: Path) -> str:
    """The core's version."""
    project = tomllib.loads((root / "core/pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def files(root: Path) -> Iterator[Path]:
    """All files that may contain the version."""
    yield from (root / "docs").glob("*.md")
    for folder in ("*", "plugins/*", "adapters/*", "examples/*"):
        yield from root.glob(f"{folder}/pyproject.toml")
        yield from root.glob(f"{folder}/src/*/*.py")


def stated(text: str, version: str) -> str:
    """The text of a file, with its versions replaced by ``version``."""
    text = _STATED.sub(rf'\g<1>{version}"', text)
    return _REQUIRED.sub(rf"\g<1>{required(version)}", text)


def problems(root: Path) -> list[str]:
    """Deviations from the core's version, one line each."""
    version = current(root)
    found = []
    for path in sorted(files(root)):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        pairs = zip(text.splitlines(), stated(text, version).splitlines(), strict=True)
        found += [f"{name}: {old.strip()!r} should be {new.strip()!r}" for old, new in pairs if old != new]
        if path.name == "pyproject.toml":
            project = tomllib.loads(text)["project"]
            free = [one for one in project.get("dependencies", ()) if re.match("polydraft", one) and ">=" not in one]
            found += [f"{name}: {one!r} needs a range, {required(version)}" for one in free]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if _UNRELEASED not in changelog:
        found.append(f"CHANGELOG.md: there is no heading {_UNRELEASED.strip()!r}")
    newest = max(_RELEASE.findall(changelog), key=_ordered, default="0.0.0")
    if _ordered(newest) > _ordered(version):
        found.append(f"CHANGELOG.md: {newest} is newer than the distributions, {version}")
    return found


def set_version(root: Path, version: str) -> None:
    """Write ``version`` everywhere. Date the unreleased part of the changelog, unless it has this release already."""
    for path in files(root):
        old = path.read_text(encoding="utf-8")
        new = stated(old, version)
        if new != old:
            path.write_text(new, encoding="utf-8")
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    if version not in _RELEASE.findall(text):
        heading = f"{_UNRELEASED}\n## [{version}] - {datetime.now(UTC).date()}\n"
        changelog.write_text(text.replace(_UNRELEASED, heading, 1), encoding="utf-8")


def _ordered(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def main() -> int:
    """Set a version, or check the current one."""
    match sys.argv[1:]:
        case []:
            pass
        case [version] if re.fullmatch(_VERSION, version):
            set_version(ROOT, version)
        case _:
            print("Usage: python ci/version.py [MAJOR.MINOR.PATCH]", file=sys.stderr)
            return 2
    found = problems(ROOT)
    print("\n".join(found) or f"All distributions are {current(ROOT)}.", file=sys.stderr if found else sys.stdout)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
