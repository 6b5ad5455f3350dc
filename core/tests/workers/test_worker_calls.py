"""Calls of a session whose engine is in a worker: what it says, raises and emits is what a session in process gives."""

import logging
import threading
import time
import traceback

import pytest
from polydraft._session.session import Session
from polydraft._workers.engine import ROOM
from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan
from polydraft.errors import (
    EngineError,
    InvalidRequestError,
    NonFiniteLogitsError,
    SystemResourceError,
    UnsupportedError,
)
from worker_helpers import alive, wait_until


def test_outputs_are_those_of_the_engine_in_process():
    polydraft = pytest.importorskip("polydraft")
    pytest.importorskip("polydraft_reference")
    here = polydraft.load("builtin:toy", isolation="none")
    worker = polydraft.load("builtin:toy", isolation="process")
    assert (here.running.process, here.running.process_id) == ("this process", None)
    assert worker.running.process == "worker"
    assert worker.running.process_reason == "`isolation='process'` was given."
    told = {"process", "process_reason", "process_id"}
    assert worker.running.model_dump(exclude=told) == here.running.model_dump(exclude=told)
    chat = [{"role": "user", "content": "Grüße!"}]
    calls = [
        ("<bos>Once upon a time", {"max_new_tokens": 60, "ignore_eos": True}),
        (chat, {"temperature": 0.9, "seed": 5, "logprobs": 2, "max_new_tokens": 30}),
        (chat, {"stop": ["e"], "ignore_eos": True}),
        ([20], {"forced_token_ids": {2: 70}, "logprobs": 1, "banned_token_ids": [4], "max_new_tokens": 9}),
        (chat, {"speculate": "off", "logit_bias": {101: -3.5}, "max_new_tokens": 9}),
        (chat, {"temperature": 0.9, "seed": 6, "acceptance": "rejection", "max_new_tokens": 30}),
    ]
    with here, worker:
        for prompt, given in calls:
            settings = {"seed": 0, **given}
            expected, found = here.generate(prompt, **settings), worker.generate(prompt, **settings)
            exclude = {"stats": {"prefill_seconds", "decode_seconds"}, "running": told}
            assert found.model_dump(exclude=exclude) == expected.model_dump(exclude=exclude)
        every = [session.generate_many(["ab", "cd", "ef"], max_new_tokens=9, seed=1) for session in (here, worker)]
        assert [one.token_ids for one in every[0]] == [one.token_ids for one in every[1]]
        calls = [[*session.stream("ab", num_speculative_tokens=2, max_new_tokens=20)] for session in (here, worker)]
        assert calls[0] == calls[1]
        assert any(chunk.draft_token_ids for chunk in calls[1])
        assert worker.engine.memory()["peak"] > 1 << 20


def test_a_worker_picks_k_where_it_is_asked_to():
    polydraft = pytest.importorskip("polydraft")
    pytest.importorskip("polydraft_reference")
    with polydraft.load("builtin:toy", num_speculative_tokens="auto", isolation="process") as worker:
        assert worker.running.max_speculative_tokens
        assert not any("in all rounds" in note for note in worker.running.notes)
        assert (
            worker.generate("abc", max_new_tokens=20).token_ids
            == worker.generate("abc", max_new_tokens=20, speculate="off").token_ids
        )


def test_a_worker_says_how_many_sequences_share_their_steps(session):
    assert session.engine.shared_sequences == 3


def test_ids_that_are_not_certain_are_none(session):
    for prompt, ids in (("m", (1, 2, 1, 2, 1, 2)), ("n", None)):
        stream = session.stream(prompt, max_new_tokens=6)
        assert [chunk.token_ids for chunk in stream] == [None, None, None]
        assert (stream.result.token_ids, stream.result.text) == (ids, "bcbcbc")


def test_errors_arrive_with_their_class_their_hint_and_all_else(session):
    with pytest.raises(EngineError, match="The engine script failed: RuntimeError: the engine's own") as caught:
        session.generate("e")
    assert caught.value.partial_text == "bcbc"
    assert "in act" in "".join(traceback.format_exception(caught.value)), "where it was raised in the worker"
    with pytest.raises(NonFiniteLogitsError, match="hold NaN") as caught:
        session.generate("f")
    assert "bfloat16" in caught.value.hint
    assert caught.value.partial_text == "bcbc"
    with pytest.raises(SystemResourceError, match="The disk is full") as caught:
        session.generate("g")
    assert (caught.value.__cause__.errno, caught.value.__cause__.filename) == (28, "/a/file")
    with pytest.raises(EngineError, match="stopped before the end") as caught:
        session.generate("l")
    assert "defect of the backend scripted" in caught.value.hint
    with pytest.raises(UnsupportedError, match="no top_k of 3"):
        session.generate("a", top_k=3)
    with pytest.raises(InvalidRequestError) as caught:
        session.generate("a", top_k=4)
    assert caught.value.argument == "top_k"


def test_a_logits_processor_is_refused_with_the_way_out(session):
    with pytest.raises(UnsupportedError, match="runs in a worker process") as caught:
        session.generate("a", logits_processor=lambda prefix, logits: logits)
    assert "`isolation='none'`" in caught.value.hint


def test_what_an_engine_says_arrives(session, caplog):
    with caplog.at_level(logging.INFO, "scripted"), pytest.warns(RuntimeWarning, match="this is slow"):
        assert session.generate("d", max_new_tokens=9).text == "bcbcbbbbb"
    assert [(line.name, line.levelname, line.message) for line in caplog.records] == [
        ("scripted.engine", "INFO", "a line of information")
    ]


def test_python_does_not_look_through_an_engine_s_objects_again(session):
    """It would take 0.2 s, in the middle of a text."""
    with pytest.raises(EngineError, match=r"[1-9][0-9]{3,} objects are frozen"):
        session.generate("o", max_new_tokens=9)


def test_standard_output_of_a_worker_goes_to_standard_error(load, capfd):
    worker = load()
    with pytest.warns(RuntimeWarning):
        worker.generate("d", max_new_tokens=9)
    written = []
    assert wait_until(lambda: written.append(capfd.readouterr()) or "native" in "".join(err for _, err in written))
    assert "".join(out for out, _ in written) == ""


@pytest.mark.parametrize("cancel", ["stream.cancel", "stream.close", "session.cancel"])
def test_a_prefill_is_cancelled_at_once(session, cancel):
    stream = session.stream("b")
    chunks = []
    thread = threading.Thread(target=lambda: chunks.extend(stream), daemon=True)
    thread.start()
    time.sleep(0.05)
    began = time.monotonic()
    {"stream.cancel": stream.cancel, "stream.close": stream.close, "session.cancel": session.cancel}[cancel]()
    thread.join(10)
    assert time.monotonic() - began < 2
    assert stream.result.finish_reason == "cancelled"
    assert session.generate("a", max_new_tokens=2).text == "bb"


@pytest.mark.parametrize("concurrency", ["serial", "concurrent"])
def test_a_slow_reader_holds_back_its_own_call_only(load, tmp_path, monkeypatch, concurrency):
    counted = tmp_path / "steps"
    monkeypatch.setenv("STEPS", str(counted))
    worker = load(concurrency=concurrency)
    stream = worker.stream("c", max_new_tokens=500)
    next(stream)
    assert wait_until(lambda: counted.stat().st_size >= ROOM)
    if concurrency == "concurrent":
        assert worker.generate("a", max_new_tokens=300).finish_reason == "length"
    time.sleep(0.05)
    assert counted.stat().st_size <= ROOM + 1, "the engine runs far ahead of a reader that does not read"
    assert sum(len(chunk.token_ids) for chunk in stream) == 499
    assert counted.stat().st_size == 500


def test_a_stream_that_is_dropped_ends_in_the_worker(load, tmp_path, monkeypatch):
    counted = tmp_path / "steps"
    monkeypatch.setenv("STEPS", str(counted))
    worker = load(concurrency="serial")
    stream = worker.stream("c", max_new_tokens=500)
    next(stream)
    del stream
    assert worker.generate("a", max_new_tokens=3).text == "bbb"
    assert counted.stat().st_size <= ROOM + 1


def test_options_and_secrets_arrive(load):
    worker = load(api_key="12345678")
    assert "The key has 8 letters." in worker.running.notes


def test_an_option_that_is_no_data_is_refused(backend):
    from typing import Any

    from polydraft._workers.backend import _crossing
    from polydraft.contract import EngineOptions

    class Odd(EngineOptions):
        hook: Any = None

    target = ModelSource(id="letters", kind="local", format="none")
    request = LoadRequest(backend="scripted", target=target, plan=SpeculationPlan(), engine_options=Odd(hook=print))
    with pytest.raises(InvalidRequestError, match="cannot be given to another process") as caught:
        _crossing(request)
    assert caught.value.argument == "engine_options"


def test_one_worker_answers_questions_and_then_loads(backend, load):
    pid = backend.diagnose().engine_version.rpartition(" ")[2]
    assert backend.diagnose().engine_version.rpartition(" ")[2] == pid
    assert load().running.process_id == int(pid)


def test_a_worker_that_was_asked_before_a_variable_was_set_is_not_used(backend, monkeypatch):
    pid = backend.diagnose().engine_version.rpartition(" ")[2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert backend.diagnose().engine_version.rpartition(" ")[2] != pid
    assert wait_until(lambda: not alive(int(pid)))


def test_sessions_are_ordinary_ones(session):
    assert type(session) is Session
