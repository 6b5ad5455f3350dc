"""The whole suite on the reference engine, unchanged: it passes."""


def test_reference_passes(conformance):
    run = conformance()
    assert run.exit_code == 0
    assert run.rows("fail") == run.rows("follows") == run.rows("excluded") == set()
    report = run.report.as_dict()
    assert report["status"] == "pass"
    assert {entry["kind"] for entry in report["acceptance"]} == {"mtp", "draft-model", "ngram"}
    assert all(
        entry["drafted"] > entry["accepted"] > 0 for entry in report["acceptance"] if entry["kind"] != "draft-model"
    )
