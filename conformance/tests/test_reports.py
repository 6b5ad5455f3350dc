"""What readers see: the page and the matrix of several runs, and near ties counted apart."""

import json
import re
from html.parser import HTMLParser
from importlib import resources

import pytest
from polydraft_conformance.__main__ import main
from polydraft_conformance.defects import stepping
from polydraft_conformance.defects.making import PluginOf, defective
from polydraft_conformance.rendering.markdown import sign_of, to_markdown
from polydraft_conformance.rendering.matrix import BEGIN, END, fill, to_matrix
from polydraft_conformance.rendering.page import to_page
from polydraft_conformance.rendering.plot import acceptance_plot, curves
from polydraft_conformance.rendering.reading import read_reports
from polydraft_conformance.rendering.statuses import look_of
from polydraft_conformance.report import HTML_NAME, JSON_NAME
from polydraft_conformance.rows import STATUSES

SELECTED = (
    "--polydraft-kinds",
    "mtp",
    "-k",
    "greedy or drafts_are_accepted or rows_equal or test_backend_can_run_here",
)


class Balanced(HTMLParser):
    """Fails where an element that is not open is closed, and keeps what the page refers to."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.outside, self.texts = [], set(), set(), [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids.add(found.get("id"))
        if found.get("href", "").startswith("#"):
            self.links.add(found["href"][1:])
        self.outside += [value for name, value in attributes if name in {"src", "href"} and not value.startswith("#")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reports of an honest run, of one with near ties, of one that fails, and of a backend that cannot run."""
    from polydraft import PluginHost
    from polydraft_conformance.testing import run_in_process
    from polydraft_reference.backend import ReferenceBackend

    reports = tmp_path_factory.mktemp("reports")
    tie = defective(stepping.LowPrecision, dtype="bfloat16", exactness=frozenset({"standard"}))
    backends = {"honest": ReferenceBackend, "low-precision": tie, "unverified": defective(stepping.Unverified)}
    for name, backend in backends.items():
        host = PluginHost({"tested": PluginOf(backend, name=name)})
        run_in_process(
            name,
            # With this seed there are near ties.
            *("--polydraft-quick", *SELECTED, "--polydraft-report", str(reports / name), "--polydraft-seed", "3"),
            host=host,
            rootdir=reports,
        )
    assert main(["unavailable", "absent", "--reason", "It needs a <GPU>.", "--report", str(reports / "absent")]) == 0
    return reports


def test_each_run_writes_a_page(folder):
    assert all((folder / name / HTML_NAME).exists() for name in ("honest", "low-precision", "unverified", "absent"))


def test_the_page_is_whole(folder):
    page = to_page(read_reports([folder]))
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.links <= parser.ids
    assert parser.outside == []
    assert "<script" not in page
    assert "@import" not in page
    assert "http" not in page
    text = " ".join(parser.texts)
    assert "Of 4 runs, 2 conform, 1 fails, 1 cannot run where it was tried." in " ".join(text.split())
    assert "It needs a <GPU>." in text


def test_the_page_shows_the_evidence(folder):
    page = to_page(read_reports([folder / "unverified"]))
    assert re.search(r"<details class=check id=evidence-0-test_greedy_equals_plain open>", page)
    assert "Speculation changed the greedy output" in page
    assert "control, the plain output in blocks of k+1 tokens" in page
    page = to_page(read_reports([folder / "low-precision"]))
    assert "≈" in page
    assert "scorings in blocks choose the other token" in page
    assert page.count("<svg") == 1
    assert "position in the draft" in page


def test_nothing_green_for_a_backend_that_fails(folder):
    """Its bar holds what failed, and the card names the causes."""
    css = resources.files("polydraft_conformance").joinpath("data/page.css").read_text("utf-8")
    assert ".card.bad .bar .good, .card.warn .bar .good { background: var(--line); }" in css
    card = to_page(read_reports([folder / "unverified"])).partition("<article class=")[2].partition("</article>")[0]
    assert card.startswith('"card bad"')
    assert "<div class=bar aria-hidden=true><i class=bad" in card
    assert (
        "<li><a href=#evidence-0-test_greedy_equals_plain><code>test_greedy_equals_plain</code></a> Speculation" in card
    )


def test_a_check_unfolds_to_what_it_proves(folder):
    (data,) = read_reports([folder / "honest"])
    data["explanations"] = {
        "test_greedy_equals_plain": {"proves": "That ``k`` <changes>\nnothing.", "look": "verify()"}
    }
    page = to_page([data])
    assert "<dt>Proves</dt><dd>That <code>k</code> &lt;changes&gt; nothing.</dd><dt>Look at</dt>" in page


@pytest.mark.parametrize("status", [*STATUSES, "of-a-later-version"])
def test_every_status_is_shown(folder, status):
    (data,) = read_reports([folder / "honest"])
    for row in data["checks"]:
        row.update(status=status, reason="Because.")
    data["summary"] = {status: len(data["checks"])}
    data["status"] = "fail" if status in {"fail", "follows"} else "pass"
    assert f"{len(data['checks'])} {look_of(status).many}" in to_page([data])
    assert f"| {sign_of(status)}" in to_markdown(data)
    words = {"pass": " | 1 |", "fail": "**FAIL", "follows": "**FAIL"}
    assert words.get(status, look_of(status).past) in to_matrix([data])
    counted = re.findall(r"<td class=(\w+)", to_page([data]))
    assert counted
    assert ("good" in counted) == (status == "pass")


def test_near_ties_are_counted_apart(folder):
    (data,) = read_reports([folder / "low-precision"])
    assert data["status"] == "pass"
    assert data["verdicts"]["NEAR_TIE"] > 0
    assert data["verdicts"]["DIVERGED"] == 0
    ties = [tie for row in data["checks"] for tie in row["numbers"].get("differences", ())]
    assert len(ties) == data["verdicts"]["NEAR_TIE"]
    for tie in ties:
        assert tie["verdict"] == "NEAR_TIE"
        assert abs(tie["margin_in_noise"]) <= 2
        assert tie["tokens"][1] in tie["tie"]["control"]
        assert re.search(r"builtin:toy \+ (varied )?builtin:toy-assistant \(mtp, k=", tie["of"])
        assert "polydraft-reference" in tie["of"]
        assert "bfloat16, cpu" in tie["of"]
    markdown = (folder / "low-precision" / "conformance-report.md").read_text("utf-8")
    assert re.search(r"near ties?\)", markdown)
    assert "## Near ties" in markdown


def test_what_diverged_in_excluded_checks_is_counted_apart(folder):
    (data,) = read_reports([folder / "honest"])
    assert "more diverged" not in to_matrix([data])
    row = next(row for row in data["checks"] if row["numbers"].get("verdicts"))
    row["numbers"]["verdicts"]["DIVERGED"] = 2
    row["status"] = "excluded"
    assert re.search(r"\| \d+ / 0 / 0; 2 more diverged in excluded checks \|", to_matrix([data]))


def test_the_matrix(folder, capsys):
    assert main(["report", str(folder)]) == 0
    table = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| `")}
    assert set(rows) == {"`honest`", "`low-precision`", "`unverified`", "`absent`"}
    assert "**FAIL**" in rows["`unverified`"]
    assert "**FAIL" not in rows["`honest`"]
    assert "cannot run here" in rows["`absent`"]
    assert re.search(r"\d+ / [1-9]\d* / 0", rows["`low-precision`"])
    assert "- low-precision, float32, cpu: " in table


def test_report_files_are_written(folder, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n\n{BEGIN}old\n{END}\nAfter.\n", "utf-8")
    arguments = ["--html", str(tmp_path / "all.html"), "--matrix", str(tmp_path / "all.md"), "--readme", str(readme)]
    assert main(["report", str(folder / "honest" / JSON_NAME), str(folder / "absent"), *arguments]) == 0
    said = capsys.readouterr()
    assert f"Open {(tmp_path / 'all.html').as_uri()} in a browser: the page of 2 runs" in said.err
    assert said.err.count("The table of 2 runs is in") == 2
    assert said.out == ""
    assert "<h1>polydraft conformance</h1>" in (tmp_path / "all.html").read_text("utf-8")
    table = (tmp_path / "all.md").read_text("utf-8")
    assert readme.read_text("utf-8") == f"Before.\n\n{BEGIN}{table}{END}\nAfter.\n"
    assert main(["report", str(folder / "honest"), "--readme", str(readme)]) == 0
    assert "`absent`" not in readme.read_text("utf-8")


def test_bad_input(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "less.json").write_text("{}")
    (tmp_path / "README.md").write_text("No marks.\n")
    for name, message in (("none", "holds no"), ("other.json", "not a conformance report"), ("less.json", "lacks")):
        assert main(["report", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="marks"):
        fill("No marks.\n", "table")


def test_reports_without_what_later_versions_added(folder):
    """A report of an older run can still be shown."""
    (data,) = read_reports([folder / "honest"])
    old = json.loads(json.dumps(data))
    del old["verdicts"], old["statements"]
    for row in old["checks"]:
        row["numbers"] = {}
    old["acceptance"] = []
    assert "test_greedy_equals_plain" in to_page([old])
    assert "`honest`" in to_matrix([old])


def test_curves():
    entry = {"target": "t", "drafter": "d", "kind": "mtp", "prompts": "window", "rounds": 10}
    entries = [
        {**entry, "k": 4, "accepted_per_position": [8, 4]},
        {**entry, "k": 1, "accepted_per_position": [9]},
        {**entry, "k": 8, "accepted_per_position": [1], "prompts": "itself"},
        {**entry, "kind": "ngram", "k": 2, "accepted_per_position": None},
    ]
    assert curves(entries) == {"mtp": (4, [0.8, 0.4, 0.0, 0.0])}
    plot = acceptance_plot("t & d", curves(entries))
    assert plot.count("<circle") == 4
    assert "t &amp; d" in plot
