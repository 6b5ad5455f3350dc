"""``polydraft.bench`` end to end on the reference engine: figures that must agree, ends, and what is refused."""

import errno
import math

import polydraft
import pytest
from polydraft._measuring import loaded, warming
from polydraft._measuring.bench import NotMeasurable
from polydraft._measuring.loaded import LoadedEngine
from polydraft._session.session import Session
from polydraft.contract import Upstream
from polydraft.errors import (
    BackendUnavailableError,
    InvalidRequestError,
    NotSavedError,
    PolydraftError,
    UnsupportedError,
)

TOY = "builtin:toy"
PROMPTS = {"code": ["def f():", "import os"], "prose": ["a word"]}


def host(module=None):
    """A host of its own, so that engines are loaded into this process."""
    from polydraft_reference import plugin

    return polydraft.PluginHost({"reference": module or plugin})


def measured(**arguments):
    given = {"prompts": PROMPTS, "max_new_tokens": 12, "repeats": 2, "host": host(), **arguments}
    return polydraft.bench(TOY, **given)


def test_all_figures_of_a_process_of_its_own():
    said = []
    found = polydraft.bench(
        TOY, prompts=PROMPTS, max_new_tokens=12, repeats=2, num_speculative_tokens=[2, "auto"], progress=said.append
    )
    assert [row.label for row in found.rows] == ["reference plain", "reference mtp k=2", "reference mtp k=auto"]
    for row in found.rows:
        assert row.state == "measured", row.reason
        assert len(row.runs) == row.repeats == 2
        assert row.spread == (min(row.runs), max(row.runs))
        assert row.first_token_seconds > 0
        assert row.decode_tokens_per_second > row.tokens_per_second > 0
        assert row.peak_memory_bytes > 10 << 20
        assert set(row.by_class) == {"code", "prose"}
        times = row.round_ms
        parts = [times.verify, times.choose, times.host, *([times.draft] if row.method else [])]
        assert min(parts) > 0 or row.num_speculative_tokens == "auto"  # which may draft nothing
        assert math.isclose(sum(parts), times.total)
        assert (times.draft is None) == (row.method is None)
    plain, two, picked = found.rows
    assert plain.times_plain is None
    assert plain.acceptance_rate is None
    assert two.same_as_plain
    assert picked.same_as_plain
    low, high = two.times_plain_spread
    assert low <= two.times_plain <= high
    assert len(two.acceptance_rate_per_position) == 2
    assert two.mean_acceptance_length == pytest.approx(1 + sum(two.acceptance_rate_per_position))
    assert found.best == max(two, picked, key=lambda row: row.tokens_per_second)
    assert found.prompts == {"code": 2, "prose": 1}
    assert "fastest reference mtp" in repr(found)
    assert "<table>" in found._repr_html_()
    assert polydraft.BenchResult.model_validate_json(found.model_dump_json()) == found
    assert [sentence.partition(",")[0] for sentence in said[-2:]] == ["Repeat 1 of 2", "Repeat 2 of 2"]
    assert "SYNTHETIC" not in found.title + repr(found) + found._repr_html_()


@pytest.mark.parametrize(("chance", "tokens"), [(0.0, 9), (0.8, 150), (1, 41)])
def test_synthetic_acceptance_is_what_was_asked_for_and_is_told_everywhere(chance, tokens, recwarn):
    arguments = {"num_speculative_tokens": 3, "max_new_tokens": tokens, "prompts": ["a"], "repeats": 1}
    found = measured(synthetic_acceptance=chance, **arguments)
    row = found.rows[1]
    assert row.acceptance_rate_per_position == pytest.approx([chance, chance**2, chance**3], abs=0.2)
    assert row.same_as_plain is None
    assert found.ignore_eos
    for told in (repr(found), found._repr_html_(), found.title):
        assert f"SYNTHETIC ACCEPTANCE {chance:g}" in told
    assert found.model_dump()["synthetic_acceptance"] == chance
    assert not recwarn.list


def test_what_an_engines_process_does_is_told_until_it_is_loaded(caplog):
    with caplog.at_level("INFO", logger="polydraft.progress"):
        polydraft.bench(TOY, prompts=["a"], max_new_tokens=4, repeats=1, num_speculative_tokens=2)
    told = [record.getMessage() for record in caplog.records if record.name == "polydraft.progress"]
    assert told[0] == f"Loading {TOY} into reference"
    assert all(message.startswith(("Warming up", "Repeat", "Splitting")) for message in told[1:])


def test_ngram_drafts():
    found = measured(drafter="ngram", prompts=["a a a a a a"], repeats=1)
    assert [row.label for row in found.rows] == ["reference plain", "reference ngram k=4"]
    assert found.rows[1].drafter is None


def test_a_sweep_goes_up_to_what_the_backend_drafts():
    found = measured(sweep_k=True, prompts=["a"], max_new_tokens=4, repeats=1)
    assert [row.num_speculative_tokens for row in found.rows] == list(range(9))


def test_k_that_is_too_large_is_a_row_and_the_others_are_measured():
    found = measured(num_speculative_tokens=[2, 99], prompts=["a"], max_new_tokens=4, repeats=1)
    assert [row.state for row in found.rows] == ["measured", "measured", "refused"]
    assert "`num_speculative_tokens=99` is too large: reference drafts at most" in found.rows[2].reason


def test_without_a_drafter_plain_decoding_is_measured_and_that_is_said():
    found = measured(drafter=None)
    assert [row.method for row in found.rows] == [None]
    assert any("only plain decoding" in note for note in found.notes)
    assert found.best is None
    assert "fastest" not in repr(found)


def test_steps_of_one_shape_are_loaded_for_each_k():
    found = measured(exactness="bitwise", num_speculative_tokens=[1, 2], repeats=1, max_new_tokens=4)
    assert [row.num_speculative_tokens for row in found.rows] == [0, 1, 2]
    assert all(row.state == "measured" for row in found.rows)
    assert found.rows[2].times_plain > 0


def test_auto_picks_up_to_what_load_would_and_is_split_as_it_was_measured(monkeypatch):
    made = []

    class Seen(Session):
        def __init__(self, engine, running, *arguments, **named):
            super().__init__(engine, running, *arguments, **named)
            if self.schedule is not None:
                made.append(self)

    monkeypatch.setattr(loaded, "Session", Seen)
    found = measured(num_speculative_tokens=[12, "auto"])
    assert found.rows[2].round_ms.draft is not None
    assert [one.running.max_speculative_tokens for one in made] == [8, 8]  # measured, and split
    assert made[0].schedule is made[1].schedule
    assert made[0].schedule.largest == 8


def test_sampling_repeats_seeds_and_outputs_are_those_of_plain_decoding():
    found = measured(temperature=0.8, num_speculative_tokens=2)
    assert found.rows[1].same_as_plain


# The engine's own loop ----------------------------------------------------------------------------------------------


class Plugin:
    """The reference plugin, whose backend says that its engine has a loop of its own."""

    def __init__(self, monkeypatch, call):
        from polydraft_reference.backend import ReferenceBackend

        monkeypatch.setattr(
            ReferenceBackend, "upstream", lambda *_: Upstream("own(draft=)", lambda _: call), raising=False
        )


def right(prompt, k, limit, ends, emit):
    with polydraft.load(TOY, host=host(), drafter=None) as session:
        tokens = session.generate(list(prompt), max_new_tokens=limit).token_ids
    size = 2 if k else 1
    for at in range(0, len(tokens), size):
        emit(tokens[at : at + size])


def test_the_engines_own_loop_takes_part(monkeypatch):
    Plugin(monkeypatch, right)
    found = measured(against="upstream", num_speculative_tokens=[1, 2], prompts=["a"], max_new_tokens=8)
    assert [(row.label, row.upstream) for row in found.rows] == [
        ("reference plain", None),
        ("reference mtp k=1", None),
        ("reference mtp k=2", None),
        ("reference upstream plain", "own(draft=)"),
        ("reference upstream mtp k=1", "own(draft=)"),
        ("reference upstream mtp k=2", "own(draft=)"),
    ]
    ours, theirs = found.rows[1], found.rows[4]
    assert theirs.same_as_plain
    assert theirs.mean_acceptance_length == 2
    assert theirs.acceptance_rate is None, "how many it drafted is not known"
    assert theirs.round_ms.total > 0
    assert theirs.round_ms.verify is None
    assert ours.times_upstream > 0
    assert theirs.times_plain > 0
    assert "upstream: own(draft=)." in found.notes


def test_a_loop_that_fails_or_differs_is_a_row(monkeypatch):
    Plugin(monkeypatch, lambda *_: 1 / 0)
    found = measured(against="upstream", prompts=["a"], repeats=1)
    assert [row.state for row in found.rows] == ["measured", "measured", "failed", "failed"]
    assert "division by zero" in found.rows[2].reason
    Plugin(monkeypatch, lambda prompt, k, limit, ends, emit: emit([1] * limit))
    found = measured(against="upstream", prompts=["a"], repeats=1)
    assert found.rows[3].same_as_plain is False
    assert any("Outputs differ" in note for note in found.notes)


def test_all_sides_have_the_same_clock(monkeypatch):
    """A side whose processor time is not known must not be the only one that pays for other programs."""
    call = LoadedEngine._call

    def disturbed(self, k, *arguments):
        # Nine tenths of each second belong to another program.
        sample = call(self, k, *arguments)
        cpu = None if k and self._unknown else sample.cpu_seconds
        return sample.model_copy(update={"seconds": 10 * sample.seconds, "cpu_seconds": cpu})

    monkeypatch.setattr(LoadedEngine, "_call", disturbed)
    monkeypatch.setattr(LoadedEngine, "_unknown", False, raising=False)
    arguments = {"num_speculative_tokens": 2, "repeats": 1, "max_new_tokens": 24}
    known = measured(**arguments).rows[0].tokens_per_second
    monkeypatch.setattr(LoadedEngine, "_unknown", True)
    assert measured(**arguments).rows[0].tokens_per_second < known / 2


# Ends and refusals ---------------------------------------------------------------------------------------------------


def interrupt_after(count, monkeypatch):
    """Ctrl+C in the call after so many, 6 of which warm up."""
    calls = []
    measure = LoadedEngine.measure

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) > count:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(LoadedEngine, "measure", interrupted)


def test_an_interruption_gives_what_was_measured(monkeypatch):
    interrupt_after(10, monkeypatch)
    found = measured()
    assert found.interrupted
    assert found.rows[0].tokens_per_second
    assert "interrupted" in found.notes[0]
    assert "part of the first repeat" in found.notes[0]
    assert not any("not split" in note for note in found.notes)


def test_a_repeat_that_was_interrupted_does_not_count_beside_whole_ones(monkeypatch):
    interrupt_after(6 + 6 + 4, monkeypatch)  # warm-up, the first repeat, four calls of the second one
    found = measured()
    assert [row.repeats for row in found.rows] == [1, 1]
    assert [len(row.runs) for row in found.rows] == [1, 1]
    assert "1 of 2 repeats" in found.notes[0]


def test_an_interruption_before_anything_was_measured_is_one(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="polydraft[charts]")
    (tmp_path / "bench.json").write_text("of another day")
    interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measured(save_to=tmp_path)
    assert (tmp_path / "bench.json").read_text() == "of another day"


def test_the_record_is_written_after_each_repeat(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="polydraft[charts]")
    seen = []

    def progress(sentence):
        if (tmp_path / "bench.json").exists():
            seen.append(polydraft.BenchResult.model_validate_json((tmp_path / "bench.json").read_text("utf-8")))

    found = measured(save_to=tmp_path, progress=progress)
    assert [row.repeats for row in seen[-1].rows] == [1, 1]
    assert seen[-1].interrupted
    assert not found.interrupted


def test_short_outputs_warm_up_until_an_engine_has_recorded_its_steps(monkeypatch):
    steps = {0: [], 2: []}
    call = LoadedEngine._call

    def seen(self, k, prompt, settings, limit):
        sample = call(self, k, prompt, settings, limit)
        if not settings.split:
            steps[k].append(sample.stats.num_target_steps)
        return sample

    monkeypatch.setattr(LoadedEngine, "_call", seen)
    found = measured(prompts=["a"], max_new_tokens=4, repeats=1, num_speculative_tokens=2)
    # The last two are the round that does not count, and the one that does.
    assert all(sum(of_side[:-2]) >= 120 > sum(of_side[:-3]) for of_side in steps.values())
    assert [row.repeats for row in found.rows] == [1, 1]


def test_python_s_collection_after_loading_falls_into_the_warm_up(monkeypatch):
    collected = []
    monkeypatch.setattr(warming.gc, "collect", lambda: collected.append(1))
    measured(prompts=["a"], max_new_tokens=4, repeats=1, num_speculative_tokens=2)
    assert len(collected) == 4  # both sides, and rounds that are split


def test_rounds_that_cannot_be_split_leave_what_was_measured(monkeypatch):
    measure = LoadedEngine.measure

    def broken(self, k, prompt, settings, limit):
        if settings.split and k:
            raise NotMeasurable("failed", "No clock.")
        return measure(self, k, prompt, settings, limit)

    monkeypatch.setattr(LoadedEngine, "measure", broken)
    plain, drafted = measured().rows
    assert plain.round_ms.verify is not None
    assert drafted.state == "measured"
    assert drafted.round_ms.verify is None
    assert "cannot be split: No clock." in drafted.reason


def test_nothing_is_repeated_once_all_have_failed(monkeypatch):
    calls, said = [], []
    monkeypatch.setattr(LoadedEngine, "_call", lambda *_: calls.append(1) or 1 / 0)
    with pytest.raises(BackendUnavailableError):
        measured(progress=said.append)
    assert len(calls) == 2
    assert not any(sentence.startswith(("Repeat", "Warmed")) for sentence in said)


def test_all_that_fail_are_an_error(monkeypatch):
    monkeypatch.setattr(LoadedEngine, "_call", lambda *_: 1 / 0)
    with pytest.raises(BackendUnavailableError, match="ZeroDivisionError: division by zero"):
        measured()


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"repeats": 0}, "repeats"),
        ({"repeats": 1.5}, "repeats"),
        ({"max_new_tokens": 1}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"synthetic_acceptance": 1.1}, "synthetic_acceptance"),
        ({"synthetic_acceptance": float("nan")}, "synthetic_acceptance"),
        ({"synthetic_acceptance": "x"}, "synthetic_acceptance"),
        ({"synthetic_acceptance": 0.5, "against": "upstream"}, "synthetic_acceptance"),
        ({"synthetic_acceptance": 0.5, "drafter": None}, "synthetic_acceptance"),
        ({"against": "x"}, "against"),
        ({"against": "upstream", "drafter": None}, "against"),
        ({"against": "upstream", "temperature": 1.0}, "temperature"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": []}, "num_speculative_tokens"),
        ({"num_speculative_tokens": [2, "x"]}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 2, "sweep_k": True}, "sweep_k"),
        ({"load_limit": 0}, "load_limit"),
        ({"load_limit": 1e99}, "load_limit"),
        ({"prompts": []}, "prompts"),
        ({"backends": "reference"}, "backends"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(arguments, argument, monkeypatch):
    monkeypatch.setattr(LoadedEngine, "__init__", lambda *_: pytest.fail("an engine was loaded"))
    with pytest.raises(InvalidRequestError) as raised:
        measured(**arguments)
    assert raised.value.argument == argument


def test_an_engine_without_a_loop_of_its_own_is_a_typed_error(monkeypatch):
    monkeypatch.setattr(LoadedEngine, "__init__", lambda *_: pytest.fail("an engine was loaded"))
    with pytest.raises(UnsupportedError, match="no loop of its engine's own for mtp drafts"):
        measured(against="upstream")


def test_acceptance_cannot_be_set_in_an_engines_own_loop(monkeypatch):
    info = LoadedEngine.info
    monkeypatch.setattr(LoadedEngine, "info", lambda self: info(self).model_copy(update={"steps": False}))
    with pytest.raises(UnsupportedError, match="keeps its own loop, in which acceptance cannot be set"):
        measured(synthetic_acceptance=0.5)


# Charts --------------------------------------------------------------------------------------------------------------


def test_without_matplotlib_the_record_is_saved_and_the_missing_chart_said_first(monkeypatch, tmp_path):
    from polydraft._measuring import charts

    monkeypatch.setattr(charts, "find_spec", lambda _: None)
    said = []
    found = measured(save_to=tmp_path / "new", progress=said.append)
    assert said[0] == found.notes[-1]
    assert "No chart is drawn: matplotlib is not installed" in said[0]
    assert "pip install 'polydraft[charts]'" in said[0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bench.json"]
    assert polydraft.BenchResult.model_validate_json((tmp_path / "new/bench.json").read_text("utf-8")) == found


@pytest.mark.parametrize("measure", [measured, lambda **how: polydraft.tune("builtin:toy", **how)])
def test_an_empty_name_of_a_folder_is_refused(measure):
    with pytest.raises(InvalidRequestError, match="`save_to` is empty"):
        measure(save_to="")


@pytest.mark.parametrize("matplotlib", [True, False])
def test_a_folder_that_cannot_be_written_is_said_first(monkeypatch, tmp_path, matplotlib):
    from polydraft._measuring import charts

    monkeypatch.setattr(charts, "find_spec", lambda _: matplotlib or None)
    monkeypatch.setattr(LoadedEngine, "__init__", lambda *_: pytest.fail("an engine was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(PolydraftError, match=r"cannot be saved in .*: Not a directory") as raised:
        measured(save_to=tmp_path / "file" / "x")
    assert not isinstance(raised.value, NotSavedError)


def test_a_result_that_cannot_be_saved_is_in_the_error(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="polydraft[charts]")
    from polydraft._measuring import charts

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(charts, "write_record", full)
    with pytest.raises(NotSavedError, match="the disk is full") as raised:
        measured(save_to=tmp_path)
    assert raised.value.result.rows[0].tokens_per_second


def test_hardware_is_what_engines_ran_on():
    found = measured()
    row = found.rows[0].model_copy(update={"device": "cuda:0", "hardware": "arm [12]; cuda:0 NVIDIA H100; cuda:1 X"})
    found = found.model_copy(update={"processor": "arm [12]"})
    assert found.hardware == "arm"
    assert found.model_copy(update={"rows": (row,)}).hardware == "arm; cuda:0 NVIDIA H100; cuda:1 X"


def test_what_was_asked_of_load_is_recorded_without_secrets():
    found = measured(dtype="float32", context_length=512)
    assert found.asked == {"dtype": "float32", "context_length": 512}


def test_the_chart_and_the_record(tmp_path):
    pytest.importorskip("matplotlib", reason="polydraft[charts]")
    import xml.etree.ElementTree as ET

    found = measured(synthetic_acceptance=0.7, num_speculative_tokens=2, save_to=tmp_path / "new")
    assert polydraft.BenchResult.model_validate_json((tmp_path / "new/bench.json").read_text("utf-8")) == found
    assert (tmp_path / "new/bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    svg = ET.parse(tmp_path / "new/bench.svg").getroot()
    texts = ["".join(node.itertext()).strip() for node in svg.iter() if node.tag.endswith("}text")]
    assert {"reference plain", "reference mtp k=2", "draft", "verify", "choose", "host"} <= set(texts)
    assert any("SYNTHETIC ACCEPTANCE 0.7" in text for text in texts)
