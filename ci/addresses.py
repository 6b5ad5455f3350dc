"""The addresses in every distribution's metadata: ``python ci/addresses.py REPOSITORY DOCUMENTATION`` sets them.

With them the links of its README, which package indexes show, lead to the repository, too. There are none before
polydraft has a public home: an address that somebody else may register misleads people.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(r'^\[project\.urls\]\n(?:\w+ = ".*"\n)*\n', re.MULTILINE)
_NEXT = re.compile(r"^\[(?!build-system\]|project\])", re.MULTILINE)
"""The first table after ``[project]``."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
"""A link in a README to a file of the repository: a package index has no such file."""


def urls(repository: str, documentation: str) -> dict[str, str]:
    """Label -> address, as package indexes show them."""
    source = repository.rstrip("/")
    return {
        "Documentation": documentation,
        "Source": source,
        "Issues": f"{source}/issues",
        "Changelog": f"{source}/blob/main/CHANGELOG.md",
    }


def files(root: Path) -> Iterator[Path]:
    """The pyproject.toml of every distribution that is released."""
    for pattern in ("*", "plugins/*", "adapters/*"):
        yield from root.glob(f"{pattern}/pyproject.toml")


def set_addresses(root: Path, addresses: dict[str, str]) -> None:
    """Write the addresses everywhere, in place of others."""
    table = "".join(f'{label} = "{address}"\n' for label, address in addresses.items())
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        before = tomllib.loads(text)["project"].get("urls", {}).get("Source")
        readme = path.with_name("README.md")
        links = with_addresses(readme.read_text(encoding="utf-8"), root, path.parent, addresses["Source"], before)
        readme.write_text(links, encoding="utf-8")
        text = _TABLE.sub("", text)
        path.write_text(_NEXT.sub(f"[project.urls]\n{table}\n[", text, count=1), encoding="utf-8")


def with_addresses(text: str, root: Path, folder: Path, source: str, before: str | None) -> str:
    """The text of a README in a folder, with addresses for paths, and for those in the repository ``before``."""

    def address(found: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / found[1]))
        kind = "tree" if path.is_dir() else "blob"
        return f"{source}/{kind}/main/{path.relative_to(root).as_posix()}"

    if before is not None:
        text = re.sub(rf"(?<=\]\(){re.escape(before)}(?=/(?:blob|tree)/main/)", source, text)
    return LINK.sub(address, text)


def main() -> int:
    """Set the addresses."""
    match sys.argv[1:]:
        case [repository, documentation] if all(re.fullmatch(r'https://[^\s"]+', one) for one in sys.argv[1:]):
            set_addresses(ROOT, urls(repository, documentation))
            return 0
    print("Usage: python ci/addresses.py https://REPOSITORY https://DOCUMENTATION", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
