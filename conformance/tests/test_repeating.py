"""A run can be repeated from its seed, and the order of checks changes no result."""

import json

import pytest
from polydraft import PluginHost
from polydraft_conformance.defects.making import PluginOf
from polydraft_conformance.report import JSON_NAME
from polydraft_conformance.testing import run_in_process, run_suite
from polydraft_reference.backend import ReferenceBackend

SEED = ("--polydraft-seed", "77")
SOME = "greedy or rollback or usual_requests or unknown_prompts or stop_id or sample_equals or statistics"


class Reversed:
    """Runs the checks in reverse order."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.reverse()


def rows_of(report_rows):
    """Rows by check and case, without what is measured in seconds."""
    return {(row["check"], row["target"], row["kind"], row["k"]): row | {"seconds": 0} for row in report_rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    def run(*arguments, plugins=()):
        host = PluginHost({"tested": PluginOf(ReferenceBackend, name="reference")})
        folder = tmp_path_factory.mktemp("run")
        found = run_in_process(
            "reference",
            *("--polydraft-quick", "--polydraft-kinds", "mtp", *arguments),
            host=host,
            rootdir=folder,
            plugins=plugins,
        )
        assert found.exit_code == 0
        return rows_of(row.as_dict() for row in found.report.rows)

    return run


@pytest.fixture(scope="module")
def first(run):
    return run(*SEED, "-k", SOME)


def test_the_order_of_checks_changes_no_result(run, first):
    assert run(*SEED, "-k", SOME, plugins=[Reversed()]) == first


def test_a_part_of_a_run_gives_the_same(run, first):
    part = run(*SEED, "-k", "rollback or unknown_prompts or stop_id")
    assert len(part) >= 4
    assert part == {key: first[key] for key in part}


def test_another_seed_gives_another_run(run, first):
    other = run("--polydraft-seed", "78", "-k", "unknown_prompts")
    assert other.keys() <= first.keys()
    assert all(row["numbers"] != first[key]["numbers"] for key, row in other.items())


def test_workers_give_the_same(first, tmp_path):
    pytest.importorskip("xdist")
    options = ("--polydraft-quick", "--polydraft-kinds", "mtp", "--polydraft-report", str(tmp_path))
    finished = run_suite("reference", *options, *SEED, "-k", SOME, "-n", "2")
    assert finished.returncode == 0, finished.stdout
    data = json.loads((tmp_path / JSON_NAME).read_text("utf-8"))
    assert data["options"]["seed"] == 77
    assert rows_of(data["checks"]) == first
