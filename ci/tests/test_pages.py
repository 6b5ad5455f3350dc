"""The pages of the documentation that are made, and that every error says what mends it."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml  # type: ignore[import-untyped]
from polydraft import errors

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_pages", ROOT / "ci/pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "ci"))
        sys.modules.pop("pages", None)
        spec.loader.exec_module(module)
    return module


def test_the_page_of_errors_is_that_of_the_docstrings(pages: ModuleType) -> None:
    assert pages.errors_page() == pages.ERRORS.read_text(encoding="utf-8"), "run `python ci/pages.py`"


@pytest.mark.parametrize("name", sorted({*errors.__all__} - {"PolydraftError"}))
def test_every_error_has_a_cause_and_a_remedy(pages: ModuleType, name: str) -> None:
    cause, remedy = pages.cause_and_remedy(getattr(errors, name))
    assert cause.endswith((".", "..."))
    assert remedy.endswith(".")


def test_the_sentences_of_the_code_are_found(pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SOURCES", ("core/src",))
    found = pages.raised()
    assert len({*found} & {*errors.__all__}) > 15
    assert ("Standard output is closed.", "Redirect it to a terminal, a file or a pipe.") in found["PolydraftError"]


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("models.md", "[x](tuning.md#how)", "[x](tuning.md#how)"),
        ("models.md", "[x](../LICENSE)", "[x](repository/LICENSE.txt)"),
        ("models.md", "[x](../adapters/llm/README.md#use)", "[x](repository/adapters/llm/README.md#use)"),
        ("adr/0001.md", "[x](../../plugins/reference/)", "[x](../repository/plugins/reference/README.md)"),
        ("adr/0001.md", "[x](../tuning.md)", "[x](../tuning.md)"),
        ("changelog.md", "[x](docs/tuning.md)", "[x](tuning.md)"),
        ("repository/CONTRIBUTING.md", "[x](docs/adr/) [y](ci/pages.py)", "[x](../adr/README.md) [y](ci/pages.py.txt)"),
        ("models.md", "[x](https://elsewhere) ![p](demo.svg)", "[x](https://elsewhere) ![p](demo.svg)"),
    ],
)
def test_links_out_of_the_site_lead_to_its_copies(pages: ModuleType, page: str, link: str, leads_to: str) -> None:
    assert pages.with_links(link, page) == leads_to


def test_the_site_has_what_its_pages_lead_to(pages: ModuleType) -> None:
    found = pages.repository_files()
    assert found["repository/SECURITY.md"] == (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "[__init__.py](__init__.py)" in found["repository/core/src/polydraft/_workers/index.md"]
    assert "repository/core/src/polydraft/_workers/__init__.py.txt" in found


def test_every_page_has_a_place() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(re.sub(r"!!python\S+ ", "", settings))["nav"]
    named = set(re.findall(r"[\w/-]+\.md", str(nav)))
    made = {"changelog.md", "reference/index.md"}
    assert named - made == {path.name for path in (ROOT / "docs").glob("*.md")} | {"checks/README.md", "adr/README.md"}
