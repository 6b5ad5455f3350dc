"""All stored results follow the schema, and docs/benchmarks.md shows them unchanged."""

import itertools
import re
import sys
from pathlib import Path

import benchmarks
import pytest

ROOT = Path(__file__).parents[2]
FILES = benchmarks.files()
TEXT = """{"what": "Speed.", "when": "2026-01-31", "commit": "abcdef1",
"hardware": {"processor": null, "cores": 2, "accelerator": null, "platform": null, "threads": null, "load": null},
"versions": {"python": "3.11.7"}, "settings": {"new_tokens": 8}, "rows": [
{"case": {"pair": "a", "side": "ours"}, "values": {"seconds": 0.25, "same": true}},
{"case": {"pair": "a", "side": "theirs"}, "values": {"seconds": 0.5, "same": null}},
{"case": {"pair": "b", "side": "ours"}, "values": {"seconds": 1.0}}]}"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_stored_result_follows_schema_and_layout(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == benchmarks.text(benchmarks.load(path))
    scripts = [script.stem for script in path.parents[1].glob("*.py")]
    assert any(path.stem == name or path.stem.startswith(f"{name}_") for name in scripts), scripts


def test_every_benchmark_has_a_result_and_a_place_on_the_page() -> None:
    page = benchmarks.PAGE.read_text(encoding="utf-8")
    scripts = [
        p for found in ("*", "plugins/*") for p in ROOT.glob(f"{found}/benchmarks/*.py") if "Recorder(" in p.read_text()
    ]
    assert len(scripts) >= 8
    for script in scripts:
        assert f"(../{script.relative_to(ROOT).as_posix()})" in page
        assert any(path.parents[1] == script.parent and path.stem.startswith(script.stem) for path in FILES), script


def test_the_page_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", "--check"])
    assert benchmarks.main() == 0


def test_a_result_that_no_table_shows_is_an_error() -> None:
    with pytest.raises(SystemExit, match=r"ngram_lookup\.json"):
        benchmarks.page("# Benchmarks\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"cores": 2', '"cores": "2"'),
        ('"cores": 2, ', ""),
        ('"commit": "abcdef1"', '"commit": "unknown"'),
        ('"when": "2026-01-31"', '"when": "yesterday"'),
        ('{"what"', '{"more": 1, "what"'),
        ('"side": "theirs"', '"side": "ours"'),
    ],
)
def test_what_breaks_the_schema_is_refused(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "good.json").write_text(TEXT)
    (tmp_path / "bad.json").write_text(TEXT.replace(old, new))
    assert len(benchmarks.load(tmp_path / "good.json").rows) == 3
    with pytest.raises(ValueError, match=r"row|Result"):
        benchmarks.load(tmp_path / "bad.json")


def test_a_table_turns_cases_into_columns_and_leaves_gaps_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    (tmp_path / "speed.json").write_text(TEXT)
    table = benchmarks.table("speed.json", ["pair"], {"seconds": ".2f", "same": ""}, across=["side"])
    assert table.splitlines()[1:] == [
        "| pair | ours: seconds | ours: same | theirs: seconds |",
        "| --- | --- | --- | --- |",
        "| a | 0.25 | yes | 0.50 |",
        "| b | 1.00 | - | - |",
        "",
        "cores 2, python 3.11.7, new tokens 8, commit abcdef1, measured 2026-01-31. [speed.json](../speed.json).",
        "",
    ]


def test_a_recorder_writes_rows_and_keeps_those_of_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(tmp_path / "speed.py")
    first = benchmarks.parser("Speed.").parse_args(["--save", "h100"])
    record = benchmarks.Recorder(script, "Speed\nof all.\n\nMore.", first, accelerator="H100", constants={"k": 4})
    record.row({"pair": "a"}, {"same": True}, {"seconds": [3.0, 1.0, 2.0]})
    path = tmp_path / "results" / "speed_h100.json"
    result = benchmarks.load(path)
    assert (result.what, result.settings, result.hardware.accelerator) == ("Speed of all.", {"k": 4}, "H100")
    assert result.rows[0].values == {"seconds": 2.0, "same": True}
    assert '"seconds": 2.0' in capsys.readouterr().out

    again = benchmarks.parser("Speed.").parse_args(["--save", "h100", "--keep"])
    more = benchmarks.Recorder(script, "Speed.", again)
    assert more.has(pair="a")
    assert not more.has(pair="b")
    more.row({"pair": "b"}, {"same": False})
    more.row({"pair": "a"}, {"same": False})
    assert [row.case for row in benchmarks.load(path).rows] == [{"pair": "b"}, {"pair": "a"}]

    path.write_text(re.sub('"commit": [^,]*', '"commit": "0000000"', path.read_text()))
    with pytest.raises(SystemExit, match="another commit"):
        benchmarks.Recorder(script, "Speed.", again)


def test_sides_take_turns_after_a_warm_up() -> None:
    calls = itertools.count(1)
    assert benchmarks.in_turn({"a": lambda: next(calls), "b": lambda: next(calls)}, 2) == {"a": [3, 5], "b": [4, 6]}
