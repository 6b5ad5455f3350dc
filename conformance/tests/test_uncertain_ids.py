"""Engines that give text: the same characters are the same output, however a tokenizer spells them."""

import pytest
from polydraft import PluginHost
from polydraft_conformance.bench import Bench
from polydraft_conformance.defects.making import PluginOf, defective
from polydraft_conformance.options import SuiteOptions
from polydraft_conformance.report import Report
from polydraft_conformance.rows import Row
from polydraft_conformance.suite import open_suite


@pytest.fixture(scope="module")
def bench():
    suite = open_suite(
        SuiteOptions("reference", quick=True, seed=5), PluginHost({"tested": PluginOf(defective(), name="reference")})
    )
    case = suite.pairs[0].case(4, "mtp")
    yield Bench(suite, case, suite.session(case), {})
    suite.close()


def test_the_same_characters_in_other_tokens(bench):
    plain = bench.session.generate([5, 6, 7], max_new_tokens=6, speculate="off")
    respelled = {"token_ids": (*plain.token_ids[:-1], (plain.token_ids[-1] + 1) % 7)}
    uncertain = plain.model_copy(update={**respelled, "certain_ids": False})
    assert bench.same(plain, uncertain, wrong="?")
    for other in (plain.model_copy(update=respelled), uncertain.model_copy(update={"raw_text": "another"})):
        with pytest.raises(AssertionError, match="DIVERGED"):
            bench.same(plain, other, wrong="?")
    assert bench.suite.take_verdicts()["verdicts"] == {"EXACT": 1, "NEAR_TIE": 0, "DIVERGED": 2}


def test_verdicts_of_excluded_checks_are_not_counted():
    numbers = {"verdicts": {"EXACT": 3, "DIVERGED": 1}}
    rows = [Row("test_a", "g", status, "toy", None, "mtp", 4, "", 0.1, numbers) for status in ("pass", "excluded")]
    report = Report("engine", {}, {}, usable=True, rows=rows[1:])
    assert report.verdicts() == {"EXACT": 0, "NEAR_TIE": 0, "DIVERGED": 0}
    report.rows.append(rows[0])
    assert report.verdicts()["DIVERGED"] == 1
