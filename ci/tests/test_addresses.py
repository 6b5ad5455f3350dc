"""Setting the addresses in the metadata of all distributions."""

import shutil
import tomllib
from pathlib import Path

import addresses

ROOT = Path(__file__).parents[2]


def test_every_distribution_gets_the_same_addresses_once(tmp_path: Path) -> None:
    for path in addresses.files(ROOT):
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    before = {path: tomllib.loads(path.read_text()) for path in addresses.files(tmp_path)}
    assert len(before) == 15
    for host in ("https://old", "https://new"):
        addresses.set_addresses(tmp_path, addresses.urls(f"{host}/polydraft/", f"{host}/docs"))
    for path, table in before.items():
        assert path.read_text().count("[project.urls]") == 1
        table["project"]["urls"] = {
            "Documentation": "https://new/docs",
            "Source": "https://new/polydraft",
            "Issues": "https://new/polydraft/issues",
            "Changelog": "https://new/polydraft/blob/main/CHANGELOG.md",
        }
        assert tomllib.loads(path.read_text()) == table


def test_the_repository_has_the_same_addresses_everywhere_or_none() -> None:
    found = [tomllib.loads(path.read_text(encoding="utf-8"))["project"].get("urls") for path in addresses.files(ROOT)]
    assert all(one == found[0] for one in found)
