"""The suite in several processes: a target's checks stay together, and a crash costs its own rows only."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("xdist", reason="polydraft-conformance[isolate] is not installed")

PLUGIN = """
from polydraft.contract import BackendRecord, hookimpl
from polydraft_conformance.defects.making import defective
from polydraft_conformance.defects.stepping import Crashing

Backend = defective(Crashing)


@hookimpl
def polydraft_backends():
    yield BackendRecord(
        name="crashing",
        factory="crashing_plugin:Backend",
        summary="Ends the process in steps of two rows",
        formats={"reference"},
        drafter_kinds={"mtp", "draft-model", "ngram"},
        engine="polydraft-reference",
        requires={},
        install_hint="none",
    )
"""


@pytest.fixture
def crashing(tmp_path):
    """A plugin that is installed for child processes only."""
    (tmp_path / "crashing_plugin.py").write_text(PLUGIN)
    info = tmp_path / "crashing_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crashing-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polydraft]\ncrashing = crashing_plugin\n")
    return os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])


def test_a_crash_costs_its_own_rows_only(crashing, tmp_path):
    report = tmp_path / "report"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1", "--pyargs"),
        *("polydraft_conformance", "--polydraft-backend", "crashing", "--polydraft-quick"),
        *("--polydraft-kinds", "mtp", "--polydraft-report", str(report)),
        *("-k", "test_generates or test_drafts_are_made or rollback_is_exact or steps_equal or declarations"),
    ]
    environment = {**os.environ, "PYTHONPATH": crashing}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    rows = json.loads((report / "conformance-report.json").read_text("utf-8"))["checks"]
    statuses = {(row["check"], row["k"]): row["status"] for row in rows}
    assert statuses[("test_generates", 1)] == "fail"
    # Checks that run no step of two rows are judged as usual.
    assert statuses[("test_steps_equal_prefill", 4)] == "pass"
    assert statuses[("test_exclusions_are_well_formed", None)] == "pass"
    died = [row for row in rows if "process died" in row["reason"]]
    assert {row["status"] for row in died} <= {"fail", "follows"}
    assert {row["check"] for row in died if row["status"] == "fail"} == {"test_generates"}
    # The engine ends the process on either target; whether the varied one gets that far is drawn.
    assert {row["target"] for row in died} - {"varied-toy"} == {"toy"}


@pytest.mark.parametrize(
    ("test", "target"),
    [
        ("test_generation.py::test_generates[tiny-e2b-draft-model-k4]", "tiny-e2b"),
        ("test_generation.py::test_generates[my-model-ngram-k12]", "my-model"),
        ("test_availability.py::test_backend_can_run_here", None),
        ("test_of_the_plugin.py::test_something[tiny-e2b-mtp-k4]", None),
    ],
)
def test_what_keeps_checks_together(test, target):
    from polydraft_conformance.by_target import ByTarget

    assert ByTarget._split_scope(None, f"checks/{test}") == (target or f"checks/{test}")


def test_a_process_without_a_target_ends():
    from polydraft_conformance.by_target import ByTarget

    class Process:
        ended = False

        def shutdown(self):
            self.ended = True

    scheduler, process = ByTarget.__new__(ByTarget), Process()
    scheduler.workqueue, scheduler.assigned_work = {}, {process: {}}
    scheduler._assign_work_unit(process)
    assert process.ended
