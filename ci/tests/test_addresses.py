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
        shutil.copy(path.with_name("README.md"), copied.parent)
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


def test_links_of_a_readme_lead_to_the_repository(tmp_path: Path) -> None:
    folder = tmp_path / "plugins/mine"
    (folder / "src").mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "mine"\n\n[tool.x]\n')
    readme = folder / "README.md"
    readme.write_text("[a](../../docs/tuning.md#k) ![b](src/) [c](#d) [e](https://old/x)")
    for source in ("https://old", "https://new"):
        addresses.set_addresses(tmp_path, addresses.urls(source, "https://docs"))
    link = "https://new/blob/main"
    assert readme.read_text() == (
        f"[a]({link}/docs/tuning.md#k) ![b](https://new/tree/main/plugins/mine/src) [c](#d) [e](https://old/x)"
    )


def test_the_repository_has_the_same_addresses_everywhere_or_none() -> None:
    found = [tomllib.loads(path.read_text(encoding="utf-8"))["project"].get("urls") for path in addresses.files(ROOT)]
    assert all(one == found[0] for one in found)
