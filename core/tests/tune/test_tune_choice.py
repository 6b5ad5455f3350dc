"""What ``load`` makes of a kept tuning, and when it does not count."""

import json
from types import SimpleNamespace

import polydraft
import pytest
from polydraft._load import prepare
from polydraft._measuring import identity
from polydraft._tune import _store
from polydraft._tune._command import _notes
from polydraft._tune._records import FORMAT, MeasuredWeights
from polydraft.contract import BackendRecord, hookimpl
from polydraft.errors import SpeculationUnavailableError
from polydraft.verification._command import verify
from tuned import SPEEDS, TOY, keep, rows_of


def choice(target=TOY, **arguments):
    found = prepare(target, **arguments)
    plan = found.request.plan
    return found.request.backend, plan.kind, plan.num_speculative_tokens, found.request.chosen_by


def by(chosen):
    return chosen.backend, chosen.drafter, chosen.num_speculative_tokens


@pytest.mark.parametrize(
    ("arguments", "kind", "k", "chosen_by"),
    [
        ({}, "mtp", 2, ("measured", "measured", "measured")),
        ({"backend": "reference"}, "mtp", 2, ("caller", "measured", "measured")),
        ({"drafter": "ngram"}, "ngram", 4, ("measured", "caller", "measured")),
        ({"drafter": "its own"}, "mtp", 2, ("measured", "caller", "measured")),
        ({"num_speculative_tokens": 4}, "ngram", 4, ("measured", "measured", "caller")),
        ({"num_speculative_tokens": 3}, "mtp", 3, ("rule", "recommended", "caller")),
        ({"num_speculative_tokens": 3, "drafter": "ngram"}, "ngram", 3, ("rule", "caller", "caller")),
        ({"drafter": None}, None, 0, ("measured", "caller", "caller")),
        ({"dtype": "float32"}, "mtp", 4, ("rule", "recommended", "recommended")),
        ({"context_length": 64}, "mtp", 4, ("rule", "recommended", "recommended")),
        ({"exactness": "bitwise"}, "mtp", 4, ("rule", "recommended", "recommended")),
        ({"backend": "reference", "engine_options": {"agreement": 0.5}}, "mtp", 4, ("caller", *["recommended"] * 2)),
    ],
)  # fmt: skip
def test_what_was_measured_is_used_for_what_the_caller_leaves_open(arguments, kind, k, chosen_by):
    if arguments.get("drafter") == "its own":
        arguments = {**arguments, "drafter": prepare(TOY).request.plan.drafter.id}
    keep()
    _, found_kind, found_k, found_by = choice(**arguments)
    assert (found_kind, found_k, by(found_by)) == (kind, k, chosen_by)


def test_the_session_says_so_with_figures():
    keep()
    with polydraft.load(TOY) as session:
        running = session.running
        assert by(running.chosen_by) == ("measured", "measured", "measured")
        figures = "Measured on 2026-11-27: reference mtp k=2 makes 140.0 tokens/s, plain decoding 110.0."
        assert running.notes[0].startswith(figures)
        assert session.generate("a", max_new_tokens=4).running == running


def test_a_choice_that_was_not_verified_says_so():
    rows = rows_of(SPEEDS)
    keep(rows=rows)
    note = prepare(TOY).request.plan.note
    assert "It was not verified then: `" in note
    assert f"verify --model {TOY} --backend reference --drafter {rows[0].drafter} -k 2` does." in note
    assert "not verified" not in prepare(TOY, drafter=None).request.plan.note, "plain decoding changes nothing"
    keep(rows=[rows[0].model_copy(update={"verdict": "EXACT"}), *rows[1:]])
    note = prepare(TOY).request.plan.note
    assert note.startswith("Measured on")
    assert "not verified" not in note


def test_the_choice_is_compared_with_the_fastest_plain_decoding_of_any_engine():
    rows = rows_of({("mtp", 2): 140.0, (None, 0): 70.0})
    other = rows[1].model_copy(update={"backend": "other", "tokens_per_second": 100.0})
    search = SimpleNamespace(confidence=lambda: 1.0)
    assert "reference mtp k=2 is 2.00 times as fast as reference plain." in _notes(search, rows, interrupted=False)
    quantized = other.model_copy(update={"backend": "small", "tokens_per_second": 130.0, "quantized": True})
    notes = _notes(search, [*rows, other, quantized], interrupted=False)
    assert "reference mtp k=2 is 1.40 times as fast as other plain." in notes


def test_it_is_kept_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYDRAFT_DATA_DIR", str(tmp_path / "elsewhere"))
    assert keep().is_relative_to(tmp_path / "elsewhere/tuned")
    assert by(choice()[3]) == ("measured", "measured", "measured")


def test_without_a_tuning_nothing_changes():
    with polydraft.load(TOY) as session:
        assert by(session.running.chosen_by) == ("rule", "recommended", "recommended")
        assert session.running.notes == ()
    assert by(choice(drafter="ngram")[3]) == ("rule", "caller", "rule")


def test_speculation_that_is_slower_is_off_and_the_result_says_why():
    keep({**SPEEDS, (None, 0): 200.0})
    with polydraft.load(TOY) as session:
        off = session.running.speculation_off
        assert off.code == "slower"
        assert "reference mtp k=2 makes 140.0 tokens/s, plain decoding 200.0 tokens/s" in off.message
        assert "`num_speculative_tokens=2` turns it on" in off.message
        assert session.generate("a", max_new_tokens=4).speculation_off == off
        with pytest.raises(SpeculationUnavailableError, match="measured to be slower"):
            session.generate("a", max_new_tokens=4, speculate="on")
    with pytest.raises(SpeculationUnavailableError) as raised:
        verify(TOY)
    assert raised.value.hint == "Give that k."
    for wanted in ({"num_speculative_tokens": 2}, {"drafter": "ngram"}):
        with polydraft.load(TOY, **wanted) as session:
            assert session.running.speculation_off is None
            assert session.running.method is not None
    with polydraft.load(TOY, drafter=None) as session:
        assert session.running.speculation_off.code == "caller"


def test_nobody_gets_quantized_weights_unasked():
    rows = rows_of(SPEEDS)
    rows[0] = rows[0].model_copy(update={"quantized": True})
    keep(rows=rows)
    assert choice()[1:3] == ("ngram", 4)
    assert choice(backend="reference")[1:3] == ("mtp", 2), "what this backend runs"
    _store.forget()
    keep(rows=[row.model_copy(update={"quantized": True}) for row in rows])
    assert choice()[1:3] == ("mtp", 2), "nothing else runs here"
    assert choice(quantization="none")[3].backend == "rule", "other arguments"


def test_k_that_is_picked_for_each_round_stays_so():
    keep()
    found = prepare(TOY, num_speculative_tokens="auto").request
    assert (found.plan.kind, found.plan.max_speculative_tokens is not None) == ("mtp", True)
    assert by(found.chosen_by) == ("measured", "measured", "caller")


def test_what_was_refused_is_not_said_to_be_slower():
    rows = rows_of({**SPEEDS, ("ngram", 1): 300.0, (None, 0): 200.0})
    rows[0] = rows[0].model_copy(update={"state": "refused", "verdict": "DIVERGED", "reason": "It changed the output."})
    keep(rows=[rows[1], rows[0], *rows[2:]])
    assert "reference mtp k=2 makes 140.0 tokens/s, plain decoding 200.0" in prepare(TOY).request.plan.off.message


def test_what_was_refused_is_never_chosen():
    rows = rows_of(SPEEDS)
    rows[0] = rows[0].model_copy(update={"state": "refused", "verdict": "DIVERGED", "reason": "It changed the output."})
    keep(rows=rows)
    assert choice()[1:3] == ("ngram", 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"versions": {"polydraft": "0.0.1"}}, "another version or build of numpy, polydraft,"),
        ({"hardware": "another; cuda:0 H100"}, "the devices were another; cuda:0 H100"),
        ({"target_weights": MeasuredWeights(id=TOY, fingerprint="0", state="0")}, "the target's files have changed"),
        ({"drafter_weights": MeasuredWeights(id="x", fingerprint="", state="")}, "the drafter's files have changed"),
        ({"drafter": "builtin:another"}, "the drafter was builtin:another"),
        ({"backend": "gone"}, "the backend gone, the fastest then, is not installed any more"),
    ],
)  # fmt: skip
def test_what_has_changed_does_not_count_and_a_note_has_the_command(change, says):
    rows = rows_of(SPEEDS)
    keep(rows=[rows[0].model_copy(update=change), *rows[1:]])
    found = prepare(TOY)
    assert by(found.request.chosen_by) == ("rule", "recommended", "recommended")
    assert found.request.plan.num_speculative_tokens == 4
    note = found.request.plan.note
    assert says in note
    assert note.endswith("Measure again: `polydraft tune --model builtin:toy`")


def test_an_engine_that_is_gone_costs_no_named_backend_its_tuning():
    rows = rows_of(SPEEDS)
    keep(rows=[rows[0].model_copy(update={"backend": "gone", "tokens_per_second": 500.0}), *rows])
    assert choice(backend="reference")[1:3] == ("mtp", 2)
    with pytest.raises(polydraft.errors.BackendNotFoundError):
        prepare(TOY, backend="gone")


def test_a_backend_that_cannot_run_any_more_is_passed_over(monkeypatch):
    class Plugin:
        @hookimpl
        def polydraft_backends(self):
            yield BackendRecord(
                name="lost", factory="polydraft_reference.backend:ReferenceBackend", summary="x", formats={"reference"},
                drafter_kinds={"mtp"}, engine="lost-engine", requires={"lost-engine": ">=2"},
                install_hint="pip install lost-engine",
            )  # fmt: skip

    rows = rows_of(SPEEDS)
    keep(rows=[rows[0].model_copy(update={"backend": "lost"}), *rows])
    from polydraft_reference import plugin

    host = polydraft.PluginHost({"lost": Plugin(), "reference": plugin})
    found = prepare(TOY, host=host)
    assert found.request.backend == "reference"
    assert "lost mtp k=2, the fastest then, cannot be used now" in found.request.plan.note


def edited(path, **changes):
    data = json.loads(path.read_text())
    data["record"].update(changes)
    path.write_text(json.dumps(data))


def test_damaged_edited_and_foreign_records_do_not_count(data_home):
    path = keep()
    assert choice()[2] == 2
    whole = path.read_text()
    for spoil in (
        lambda: edited(path, created="2027-01-01"),
        lambda: path.write_text(whole[: len(whole) // 2]),
        lambda: path.write_text("{}"),
        lambda: path.write_bytes(b"\xff\x00"),
    ):
        spoil()
        assert choice()[2] == 4
    path.write_text(whole)
    path.rename(data_home / "0123.json")
    assert choice()[2] == 4, "a record under another name is not of this subject"


def test_records_of_another_version_do_not_count():
    path = keep()
    result = _store.kept()[0].model_copy(update={"format": FORMAT + 1})
    _store.save(result)
    assert path.is_file()
    assert _store.kept() == []
    assert choice()[2] == 4


def test_forgetting():
    keep()
    keep(dtype="float32")
    keep(name="another")
    assert len(_store.kept()) == 3
    assert _store.forget("unknown") == 0
    assert _store.forget(TOY) == 2
    assert choice()[2] == 4
    assert _store.forget() == 1


def test_a_newer_tuning_of_the_same_replaces_the_older():
    keep()
    keep({**SPEEDS, ("mtp", 4): 300.0})
    assert len(_store.kept()) == 1
    assert choice()[2] == 4


def test_no_large_file_is_read_for_a_look(monkeypatch, tmp_path):
    from polydraft.checkpoints import contents
    from polydraft.contract import HubOptions
    from polydraft.contract.requests import ModelSource

    def model(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(contents._SMALL))
        return ModelSource(id=str(folder), kind="local", path=folder, format="safetensors")

    hub = HubOptions()
    monkeypatch.setattr(contents, "_SETTLED", -1.0)
    one = model("one")
    kept = identity.weights_of(one, hub)
    copy = model("copy")
    read = contents._hashed

    def only_small(path):
        assert path.suffix == ".json", f"{path} was read"
        return read(path)

    monkeypatch.setattr(contents, "_hashed", only_small)
    assert identity.same_weights(kept, one, hub)
    assert not identity.same_weights(kept, copy, hub), "its bytes are not known yet"
    monkeypatch.setattr(contents, "_hashed", read)
    assert identity.weights_of(copy, hub).fingerprint == kept.fingerprint
    if contents._keeps_time_of_change(copy.path / "model.safetensors"):
        monkeypatch.setattr(contents, "_hashed", only_small)
        assert identity.same_weights(kept, copy, hub), "the same bytes, known from before"
