"""``polydraft.tune`` end to end on the reference engine, in processes and in this one; and processes that fail."""

import os
import sys
import time

import polydraft
import pytest
from polydraft._load_arguments import checked_arguments
from polydraft._measuring import charts, processes
from polydraft._measuring.bench import CallSettings, Group, LoadedInfo, MeasuredWeights, NotMeasurable, Way
from polydraft._measuring.loaded import LoadedEngine
from polydraft._measuring.processes import BenchInProcesses
from polydraft._measuring.prompts import MeasuredPrompt
from polydraft._probes.interpreter import own_python
from polydraft._tune import _chart, _command, _store
from polydraft.errors import BackendUnavailableError, InvalidRequestError, PolydraftError
from polydraft.verification._command import verify
from tuned import keep, rows_of

TOY = "builtin:toy"
PROMPTS = {"code": ["def f():"], "prose": ["a word"]}
posix = pytest.mark.skipif(sys.platform == "win32", reason="scripts and signals of POSIX")


def here():
    """A host of its own, so that engines are loaded into this process."""
    from polydraft_reference import plugin

    return polydraft.PluginHost({"reference": plugin})


def test_each_engine_in_a_process_of_its_own():
    said = []
    found = polydraft.tune(TOY, seconds=4, prompts=PROMPTS, max_new_tokens=6, progress=said.append)
    assert {row.method for row in found.rows} == {None, "mtp", "ngram"}
    for row in found.rows:
        assert row.state in {"measured", "dropped"}, row.reason
        assert row.tokens_per_second > 0
        assert row.spread[0] <= row.tokens_per_second * 1.5
        assert set(row.by_class) == {"code", "prose"}
        assert row.first_token_seconds > 0
        assert row.load_seconds > 0
        assert row.peak_memory_bytes > 10 << 20
        assert row.target_weights.fingerprint.startswith("sha256:")
        assert row.same_as_plain in ({None} if row.method is None else {True})
        assert (row.acceptance_rate is None) == (row.method is None) or row.method == "ngram"
    assert found.choice is found.rows[0]
    assert found.kept
    assert found.prompts == {"code": 1, "prose": 1}
    assert any("Loading reference" in sentence for sentence in said)
    assert polydraft.TuningResult.model_validate_json(found.model_dump_json()) == found
    with polydraft.load(TOY) as session:
        assert session.running.chosen_by.backend == "measured"
        assert session.running.num_speculative_tokens == found.choice.num_speculative_tokens


def test_with_a_host_of_ones_own_in_this_process_and_kept_verdicts_are_read():
    kept = verify(TOY, time_limit=3, backend="reference", num_speculative_tokens=2)
    one_k = {"drafter": "auto", "num_speculative_tokens": 2}
    found = polydraft.tune(TOY, seconds=6, prompts=["a"], max_new_tokens=4, host=here(), keep=False, **one_k)
    assert {row.num_speculative_tokens for row in found.rows} == {0, 2}
    row = next(row for row in found.rows if row.method == "mtp")
    assert row.verdict in {kept.verdict, None}
    assert not found.kept
    assert _store.kept() == []


def test_the_verdict_is_that_of_verify(broken):
    from defects import Unverified

    given = checked_arguments(TOY, {"backend": "reference"})
    way = Way(method="mtp", argument="auto", recommended=4, most=8, any_k=True)
    engine = LoadedEngine(TOY, given, Group("reference", way, 4), here())
    assert engine.verdict(2, 0.0) is None, "not known yet"
    assert engine.verdict(2, 3.0) == "EXACT"
    assert engine.verdict(2, 0.0) == "EXACT", "kept"
    assert engine.verdict(3, 0.0) is None, "of another k"
    engine.close()
    broken(Unverified)
    engine = LoadedEngine(TOY, given, Group("reference", way, 4), here())
    assert engine.verdict(4, 3.0) == "DIVERGED"
    engine.close()


def test_speculation_that_changed_the_output_is_told_with_the_command_that_shows_where():
    row = rows_of({("ngram", 2): 100.0})[0]
    row = row.model_copy(update={"state": "refused", "verdict": "DIVERGED", "reason": "It changed the output."})
    given = checked_arguments(TOY, {"dtype": "float32"})
    assert _command._with_command(row, TOY, given).reason == (
        "It changed the output. `polydraft verify --model builtin:toy --backend reference --drafter ngram -k 2 "
        "--dtype float32 --time-limit 20` shows where."
    )


def test_an_interruption_gives_what_was_measured_and_keeps_nothing(monkeypatch):
    calls = []
    measure = LoadedEngine.measure

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(LoadedEngine, "measure", interrupted)
    found = polydraft.tune(TOY, seconds=30, prompts=["a"], max_new_tokens=4, host=here())
    assert found.interrupted
    assert found.rows[0].tokens_per_second
    assert not found.kept
    assert _store.kept() == []
    assert "interrupted" in found.notes[0]


def test_an_engine_that_fails_is_a_row_and_all_that_fail_are_an_error(monkeypatch):
    monkeypatch.setattr(LoadedEngine, "_call", lambda *_: 1 / 0)
    with pytest.raises(BackendUnavailableError, match="ZeroDivisionError: division by zero") as raised:
        polydraft.tune(TOY, seconds=5, prompts=["a"], host=here())
    assert "Nothing could be measured for builtin:toy" in raised.value.message


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"seconds": 0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": "x"}, "seconds"),
        ({"seconds": 1e99}, "seconds"),
        ({"load_limit": -1}, "load_limit"),
        ({"load_limit": 1e12}, "load_limit"),
        ({"max_new_tokens": 1}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "/no/such/file"}, "prompts"),
        ({"backends": []}, "backends"),
        ({"backends": "reference"}, "backends"),
        ({"backends": 5}, "backends"),
        ({"backends": [5]}, "backends"),
        ({"backends": [{}]}, "backends"),
        ({"prompts": [[{5: 1}]]}, "prompts"),
        ({"engine_options": {5: 1}}, "engine_options"),
        ({"engine_options": {"x": object()}}, "engine_options"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": "auto"}, "num_speculative_tokens"),
        ({"nonsense": 1}, "nonsense"),
        ({"backend": "reference", "engine_options": {"nonsense": 1}}, "engine_options"),
    ],
)
def test_wrong_arguments_are_refused(arguments, argument, monkeypatch):
    closed = []
    close = BenchInProcesses.close
    monkeypatch.setattr(BenchInProcesses, "close", lambda self: (closed.append(self._looking), close(self)))
    with pytest.raises(InvalidRequestError) as raised:
        polydraft.tune(TOY, **{"seconds": 5, **arguments})
    assert raised.value.argument == argument
    assert closed == ([{}] if "backend" in arguments else []), "no process is left"


def test_k_that_is_too_large_is_refused_by_name_and_plain_decoding_is_measured():
    found = polydraft.tune(
        TOY, seconds=5, prompts=["a"], max_new_tokens=4, host=here(), keep=False, num_speculative_tokens=99
    )
    assert [row.method for row in found.rows if row.state == "measured"] == [None]
    assert "`num_speculative_tokens=99` is too large: reference drafts at most" in found.rows[1].reason


def test_what_does_not_exist_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(processes, "_Process", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(polydraft.errors.ModelNotFoundError):
        polydraft.tune("builtin:toi")
    with pytest.raises(polydraft.errors.BackendNotFoundError):
        polydraft.tune(TOY, backends=["nonsense"])


@posix
def test_a_folder_that_cannot_be_written_is_said_before_anything_starts(monkeypatch, data_home):
    monkeypatch.setattr(processes, "_Process", lambda *_: pytest.fail("a process was started"))
    data_home.parent.parent.mkdir(parents=True)
    data_home.parent.write_text("a file where the folder would be")
    with pytest.raises(PolydraftError, match="cannot be kept") as raised:
        polydraft.tune(TOY, seconds=5)
    assert "`keep=False`" in raised.value.hint


# Processes that fail -----------------------------------------------------------------------------------------------


def bench(tmp_path, script, **options):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    given = checked_arguments(TOY, {})
    return BenchInProcesses(TOY, given, named=False, **{"load_limit": 5.0, "python": lambda _: program, **options})


@posix
@pytest.mark.parametrize(
    ("script", "state", "says"),
    [
        ("echo 'free(): invalid pointer' >&2; kill -ABRT $$", "failed", "ended by SIGABRT. Its last words: free()"),
        ("kill -KILL $$", "failed", "ended by SIGKILL"),
        ("exit 7", "failed", "ended with exit code 7"),
        ("read line; echo nonsense; sleep 60", "failed", "not understood"),
        ("sleep 60", "slow", "within 1 s"),
    ],
)
def test_a_process_that_fails_is_a_reason(tmp_path, monkeypatch, script, state, says):
    monkeypatch.setattr(processes, "_LOOK", 1.0)
    started = time.monotonic()
    with pytest.raises(NotMeasurable) as raised:
        bench(tmp_path, script).ways("reference")
    assert raised.value.state == state
    assert says in raised.value.reason
    assert time.monotonic() - started < 30


@posix
def test_another_environments_python_does_not_import_what_this_ones_does(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/packages/of/this/one")
    with pytest.raises(NotMeasurable, match="Its last words: <>"):
        bench(tmp_path, 'echo "<$PYTHONPATH>" >&2; exit 7').ways("reference")


@posix
def test_an_engine_that_is_killed_in_the_middle_is_a_reason_and_the_next_load_works(tmp_path):
    given = checked_arguments(TOY, {})
    measuring = BenchInProcesses(TOY, given, named=False, load_limit=60.0, python=lambda _: own_python())
    try:
        plain, mtp, _ = measuring.ways("reference")
        group = Group("reference", mtp, 4)
        assert measuring.load(group).any_k
        process = measuring._running[group]._child
        os.kill(process.pid, 9)
        prompt = MeasuredPrompt(kind="x", prompt="a")
        with pytest.raises(NotMeasurable, match="SIGKILL"):
            measuring.measure(group, 2, prompt, CallSettings(max_new_tokens=4), 5.0)
        assert not measuring.together([group])
        assert measuring.measure(group, 2, prompt, CallSettings(max_new_tokens=4), 5.0).num_tokens == 4, (
            "it was loaded again"
        )
        chat = MeasuredPrompt(kind="x", prompt=({"role": "user", "content": "a"},), raw="a")
        assert measuring.measure(group, 0, chat, CallSettings(max_new_tokens=4), 5.0).num_tokens == 4
        children = [process._child for process in measuring._running.values()]
    finally:
        measuring.close()
    assert all(child.poll() is not None for child in children)
    assert plain.method is None


def test_engines_are_ended_before_another_one_where_memory_is_short(monkeypatch):
    class Process:
        alive = True

        def __init__(self, _):
            pass

        def ask(self, job, *_):
            if job.what == "memory":
                return {"peak_memory_bytes": 3 << 30, "device_memory_bytes": None}
            weights = MeasuredWeights(id="t", fingerprint="f", state="s")
            info = LoadedInfo(
                any_k=True, load_seconds=1, dtype="float32", device=job.arguments["device"], versions={}, hardware="",
                target_weights=weights,
            )  # fmt: skip
            return info.model_dump(mode="json")

        def end(self):
            self.alive = False

    monkeypatch.setattr(processes, "_Process", Process)
    groups = [Group("reference", Way(), k) for k in range(3)]
    for device, free, together in (("cpu", 4 << 30, True), ("cpu", 3 << 30, False), ("cuda:0", 99 << 30, False)):
        given = checked_arguments(TOY, {"device": device})
        measuring = BenchInProcesses(
            TOY, given, named=False, load_limit=1.0, python=lambda _: own_python(), free_memory=lambda free=free: free
        )
        for group in groups:
            measuring.load(group)
        assert measuring.together(groups) == together
        assert measuring.together(groups[-1:])
        measuring.load(groups[0])
        assert measuring.info(groups[2]).peak_memory_bytes == 3 << 30, "what it took is known after its end"
        measuring.close()


def test_secrets_cross_in_the_pipe_only_and_are_not_kept():
    given = checked_arguments(TOY, {"token": "hf_abc", "engine_options": {"api_key": "k", "threads": 2}})
    measuring = BenchInProcesses(TOY, given, named=False, load_limit=1.0, python=lambda _: own_python())
    assert measuring._arguments["token"] == "hf_abc"
    assert measuring._arguments["engine_options"] == {"api_key": "k", "threads": 2}
    assert _command.asked_of(given).engine_options == {"threads": 2}


# Charts ------------------------------------------------------------------------------------------------------------


def test_the_chart_and_the_record(tmp_path):
    pytest.importorskip("matplotlib", reason="polydraft[charts]")
    import xml.etree.ElementTree as ET

    keep()
    (result,) = _store.kept()
    result = result.model_copy(update={"target": "an $odd$ name <&> of 日本"})
    paths = _chart.save(result, tmp_path / "new/folder")
    assert [path.name for path in paths] == ["tuning.json", "tuning.png", "tuning.svg"]
    assert polydraft.TuningResult.model_validate_json(paths[0].read_text(encoding="utf-8")) == result
    png = paths[1].read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) > (800, 300)
    svg = ET.parse(paths[2]).getroot()
    texts = ["".join(node.itertext()).strip() for node in svg.iter() if node.tag.endswith("}text")]
    assert "reference mtp k=2 (chosen)" in texts
    assert "reference plain" in texts
    assert any("140.0" in text for text in texts)
    assert any("an $odd$ name <&>" in text for text in texts)
    again = _chart.save(result, tmp_path / "other")
    assert again[2].read_bytes() == paths[2].read_bytes(), "the same result, the same file"


def test_without_matplotlib_the_record_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda _: None)
    keep()
    assert [path.name for path in _chart.save(_store.kept()[0], tmp_path / "new")] == ["tuning.json"]
    found = polydraft.tune(TOY, seconds=2, prompts=["a"], max_new_tokens=4, host=here(), keep=False, save_to=tmp_path)
    assert "No chart is drawn: matplotlib is not installed" in found.notes[-1]
    assert polydraft.TuningResult.model_validate_json((tmp_path / "tuning.json").read_text("utf-8")) == found


def test_a_chart_that_cannot_be_written(tmp_path):
    keep()
    (tmp_path / "file").write_text("")
    with pytest.raises(PolydraftError, match="cannot be saved"):
        _chart.save(_store.kept()[0], tmp_path / "file")
