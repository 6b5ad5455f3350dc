"""Options, usage errors, availability, and the files that are written."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from polydraft.contract import Diagnosis
from polydraft_conformance.__main__ import main
from polydraft_conformance.defects import stepping
from polydraft_conformance.defects.making import defective
from polydraft_conformance.rendering.markdown import to_markdown
from polydraft_conformance.report import JSON_NAME, MARKDOWN_NAME

USAGE = pytest.ExitCode.USAGE_ERROR


def test_report_files(conformance, tmp_path):
    run = conformance("-k", "test_greedy_equals_plain", "--polydraft-report", str(tmp_path / "report"))
    data = json.loads((tmp_path / "report" / JSON_NAME).read_text("utf-8"))
    assert data["format_version"] == 1
    assert data["status"] == "pass"
    assert data["backend"]["name"] == "reference"
    assert data["backend"]["engine_version"]
    assert data["backend"]["claims"]["seed_identical"] is True
    assert data["options"] == {
        "pairs": [],
        "kinds": [],
        "dtype": "float32",
        "device": "cpu",
        "quick": True,
        "one_session": False,
        "seed": 5,
        "k": [4, 1],
    }
    assert {"python", "platform", "machine", "devices", "versions"} <= set(data["environment"])
    assert {"polydraft", "polydraft-conformance"} <= set(data["environment"]["versions"])
    assert data["summary"]["pass"] == len(data["checks"]) == len(run.report.rows) == 7  # one on a varied copy
    row = data["checks"][0]
    assert row["numbers"]["verdicts"] == {"EXACT": 3, "NEAR_TIE": 0, "DIVERGED": 0}
    assert data["verdicts"] == {"EXACT": 21, "NEAR_TIE": 0, "DIVERGED": 0}
    assert row["numbers"]["tokens_compared"] > 40
    markdown = (tmp_path / "report" / MARKDOWN_NAME).read_text("utf-8")
    assert markdown == to_markdown(data)
    assert "| greedy | `test_greedy_equals_plain` | pass 6 | pass |  |" in markdown


def test_a_failure_in_the_report(conformance):
    run = conformance("-k", "test_drafts_are_made", "--polydraft-kinds", "mtp", backend=defective(stepping.Silent))
    markdown = to_markdown(run.report.as_dict())
    assert "**FAIL** 2" in markdown
    assert "## Failures" in markdown
    assert "- `test_drafts_are_made` (toy, mtp, k=4): The drafter is silent" in markdown


@pytest.fixture
def pytest_here(tmp_path):
    """Runs pytest in a process and folder of its own, where the suite is nothing but an installed plugin."""

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_no_backend_is_named(pytest_here):
    finished = pytest_here("--pyargs", "polydraft_conformance")
    assert finished.returncode == USAGE
    assert "--polydraft-backend NAME" in finished.stderr


def test_a_backend_that_is_not_installed(pytest_here):
    finished = pytest_here("--pyargs", "polydraft_conformance", "--polydraft-backend", "no-such")
    assert finished.returncode == USAGE
    assert "no backend 'no-such'" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--polydraft-pairs", "no-such-target"], "no-such-target"),
        (["--polydraft-pairs", "builtin:toy=builtin:no-such"], "no-such"),
        (["--polydraft-kinds", "magic"], "drafter kind 'magic'"),
        (["--polydraft-kinds", "eagle3"], "no pair to run"),
        (["--polydraft-time-limit", "0"], "not a number of seconds"),
        (["--polydraft-time-limit", "nan"], "not a number of seconds"),
        (["--polydraft-time-limit", "1e99"], "not a number of seconds"),
    ],
)
def test_usage_errors(conformance, capfd, arguments, message):
    assert conformance(*arguments).exit_code == USAGE
    output = capfd.readouterr()
    assert message in output.err + output.out


def test_named_pairs(conformance):
    run = conformance("--polydraft-pairs", "builtin:toy=builtin:toy-draft", "-k", "test_greedy_equals_plain")
    assert {(row.drafter, row.kind) for row in run.report.rows} == {
        ("builtin:toy-draft", "draft-model"),
        ("varied builtin:toy-draft", "draft-model"),
        ("ngram", "ngram"),
    }
    run = conformance("--polydraft-pairs", "t*", "--polydraft-kinds", "ngram", "-k", "test_greedy_equals_plain")
    assert {(row.drafter, row.kind) for row in run.report.rows} == {("ngram", "ngram")}


@pytest.fixture
def unusable():
    from polydraft_reference.backend import ReferenceBackend

    class Unusable(ReferenceBackend):
        def capabilities(self):
            raise ImportError("no engine")

        def diagnose(self):
            return Diagnosis(usable=False, reason="It needs a GPU.", remedy="Buy one.")

    return Unusable


def test_a_backend_that_cannot_run_here_is_a_result(conformance, unusable, tmp_path):
    run = conformance("--polydraft-report", str(tmp_path), backend=unusable)
    assert run.exit_code == 0
    data = json.loads((tmp_path / JSON_NAME).read_text("utf-8"))
    assert data["status"] == "cannot-install"
    assert data["availability"] == {"usable": False, "reason": "It needs a GPU.", "remedy": "Buy one."}
    (row,) = data["checks"]
    assert (row["check"], row["status"]) == ("test_backend_can_run_here", "cannot-install")
    assert "It needs a GPU. Buy one." in (tmp_path / MARKDOWN_NAME).read_text("utf-8")


def test_what_the_record_requires_is_asked_before_the_backend(conformance, unusable):
    relying = type("Relying", (unusable,), {"diagnose": lambda self: importlib.metadata.version("no-such-engine")})
    run = conformance(backend=relying, requires={"no-such-engine": ">=1"})
    assert run.exit_code == 0
    assert not run.report.usable
    assert "no-such-engine >=1, which is not installed" in run.report.reason


def test_a_backend_that_must_run(conformance, unusable):
    run = conformance("--polydraft-must-run", backend=unusable)
    assert run.exit_code == 1
    assert run.rows("fail") == {"test_backend_can_run_here"}


def test_an_unusable_backend_gives_reason_and_remedy(conformance, unusable):
    silent = type("Silent", (unusable,), {"diagnose": lambda self: Diagnosis(usable=False)})
    assert conformance(backend=silent).rows("fail") == {"test_backend_can_run_here"}


def test_tests_of_others_are_left_alone(pytest_here, tmp_path):
    test = "def test_one(): assert 1\ndef test_two():\n    import sys\n    assert 'polydraft' not in sys.modules\n"
    (tmp_path / "test_others.py").write_text(test)
    finished = pytest_here()
    assert finished.returncode == 0, finished.stdout
    assert "2 passed" in finished.stdout


def test_unavailable_is_recorded_without_a_run(tmp_path, capsys):
    arguments = ["unavailable", "mlx", "--reason", "MLX has no wheel for this platform.", "--report", str(tmp_path)]
    assert main(arguments) == 0
    data = json.loads((tmp_path / JSON_NAME).read_text("utf-8"))
    assert data["status"] == "cannot-install"
    assert data["availability"]["reason"] == "MLX has no wheel for this platform."
    capsys.readouterr()
    assert main(["markdown", str(tmp_path / JSON_NAME)]) == 0
    assert "cannot be installed here" in capsys.readouterr().out
    assert main(["protocol", "ollama", "--reason", "Its server is not to be had.", "--report", str(tmp_path)]) == 0
    assert json.loads((tmp_path / JSON_NAME).read_text("utf-8"))["status"] == "protocol"
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| `ollama` | - | protocol only | - | protocol only | protocol only | - |" in table
    assert "- ollama: Its server is not to be had." in table
    (tmp_path / "other.json").write_text("{}")
    assert main(["markdown", str(tmp_path / "other.json")]) == 1
    assert main(["markdown", str(tmp_path / "none.json")]) == 1
