"""The engine on the built-in pairs: what the conformance suite does not ask."""

import datetime
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polydraft
import pytest
from polydraft.errors import (
    DeviceError,
    InvalidRequestError,
    ModelFormatError,
    OutOfMemoryError,
    PairMismatchError,
    UnsupportedError,
)
from polydraft_xllamacpp import loading
from polydraft_xllamacpp.backend import XllamacppBackend
from polydraft_xllamacpp.probes import split_characters_lack_logprobs

PROMPT = [2, *range(300, 340)]
LOOP = [2, *[300, 301, 302, 303] * 8]
LONG = {"max_new_tokens": 60, "ignore_eos": True}


def test_what_it_said_about_the_machine_is_kept():
    assert XllamacppBackend().diagnose().depends_on == ()


def load(gguf, name="tiny-e2b", drafter="tiny-e2b-assistant", **arguments):
    drafter = gguf(drafter) if drafter in {"tiny-e2b-assistant", "tiny-26b-assistant", "tiny-llama-draft"} else drafter
    arguments = {"context_length": 512, "device": "cpu", **arguments}
    return polydraft.load(gguf(name), backend="xllamacpp", drafter=drafter, **arguments)


@pytest.fixture(scope="module")
def session(gguf):
    with load(gguf) as session:
        yield session


@pytest.mark.parametrize(
    ("name", "drafter"),
    [("tiny-e2b", "tiny-e2b-assistant"), ("tiny-26b", "tiny-26b-assistant"), ("tiny-llama", "tiny-llama-draft")],
)
def test_drafts_change_nothing(gguf, name, drafter):
    with load(gguf, name, drafter) as session:
        found = session.generate(PROMPT, **LONG)
        plain = session.generate(PROMPT, **LONG, speculate="off")
        assert found.token_ids == plain.token_ids
        assert found.stats.num_accepted_tokens > 0
        assert plain.stats.num_draft_tokens == 0
        samples = [session.generate(PROMPT, **LONG, temperature=0.9, top_p=0.95, seed=seed) for seed in (5, 5, 6)]
        assert samples[0].token_ids == samples[1].token_ids != samples[2].token_ids
        assert samples[0].stats.num_accepted_tokens > 0


@pytest.mark.parametrize("kind", ["simple", "map-k", "map-k4v", "mod"])
def test_every_kind_of_ngram_drafts(gguf, kind):
    with load(gguf, drafter="ngram", num_speculative_tokens=3, engine_options={"ngram_type": kind}) as session:
        chunks = list(session.stream(LOOP, **LONG))
        plain = session.generate(LOOP, **LONG, speculate="off")
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == plain.token_ids
    assert {chunk.num_draft_tokens for chunk in chunks} >= {0, 3}
    assert max(chunk.num_draft_tokens for chunk in chunks) == 3


def test_log_probabilities_are_those_of_plain_decoding(session):
    """The server says 0 for tokens of rounds with drafts."""
    result = session.generate(PROMPT, max_new_tokens=8, logprobs=2)
    assert result.speculation_off.code == "settings"
    assert all(entry.logprob < 0 and len(entry.top) == 2 for entry in result.logprobs)
    assert tuple(entry.token_id for entry in result.logprobs) == result.token_ids
    body = {"prompt": PROMPT, "n_predict": 8, "temperature": 0, "n_probs": 1, "cache_prompt": False}
    answer = session.engine.server.client.json("/completion", body)
    zeros = [entry["logprob"] for entry in answer["completion_probabilities"][1:]]
    assert zeros == [0.0] * 7, "drafts have log-probabilities now: remove `speculation_conflict`"
    with pytest.raises(UnsupportedError, match="log-probabilities of drafted tokens"):
        session.generate(PROMPT, max_new_tokens=8, logprobs=2, speculate="on")


def test_slots_work_together(session):
    single = session.generate(PROMPT, **LONG)
    assert session.engine.server is not session.engine.plain_server
    assert {result.token_ids for result in session.generate_many([PROMPT] * 6, **LONG)} == {single.token_ids}
    streams = [session.stream(PROMPT, **LONG) for _ in range(3)]
    firsts = [next(stream) for stream in streams]
    assert len(firsts) == 3  # none waits for another's end
    with ThreadPoolExecutor(3) as pool:
        rest = list(pool.map(lambda stream: [*stream], streams))
    for first, chunks in zip(firsts, rest, strict=True):
        assert tuple(token for chunk in (first, *chunks) for token in chunk.token_ids) == single.token_ids


def test_a_closed_stream_frees_its_slot(gguf):
    with load(gguf, context_length=4096, engine_options={"n_parallel": 1}) as session:
        for _ in range(3):
            stream = session.stream(PROMPT, max_new_tokens=4000, ignore_eos=True)
            next(stream)
            stream.close()
        started = time.monotonic()
        assert session.generate(PROMPT, max_new_tokens=4).token_ids
        assert time.monotonic() - started < 5
        assert not [thread for thread in threading.enumerate() if thread.name == "polydraft-answer"]


def test_nobody_else_gets_answers(session):
    """Other users of this machine reach its loopback interface, too."""
    url = session.engine.server.client.url
    assert url.startswith("http://127.0.0.1:")
    for path in ("/completion", "/props", "/slots", "/metrics"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url + path, data=b"{}" if path == "/completion" else None)
        assert error.value.code in {401, 501}


def test_files_that_llama_cpp_rejects(gguf, tmp_path, capfd):
    text = gguf("tiny-llama").read_bytes()
    file = tmp_path / "other.gguf"
    file.write_bytes(text.replace(b"llama", b"xlama"))
    with pytest.raises(ModelFormatError, match=r"llama.cpp cannot load .*unknown model architecture: 'xlama'"):
        polydraft.load(file, backend="xllamacpp", drafter=None, device="cpu")
    assert capfd.readouterr().err == ""
    with pytest.raises(PairMismatchError):
        polydraft.load(gguf("tiny-e2b"), backend="xllamacpp", drafter=gguf("tiny-26b-assistant"), device="cpu")


def test_options_that_do_not_fit(gguf, monkeypatch):
    with pytest.raises(DeviceError, match="sees no device 'cuda'"):
        load(gguf, device="cuda")
    with pytest.raises(InvalidRequestError, match="runs on the CPU"):
        load(gguf, engine_options={"n_gpu_layers": 4})
    with pytest.raises(InvalidRequestError, match="a step runs 40 tokens"):
        load(gguf, num_speculative_tokens=9, engine_options={"n_batch": 32, "n_parallel": 4})
    monkeypatch.setattr(loading, "free_memory", lambda: 40 << 20)
    with pytest.raises(OutOfMemoryError, match="64 contexts need about"):
        load(gguf, engine_options={"n_parallel": 64})
    with load(gguf, context_length=2048) as session:  # fewer than four slots
        assert session.generate(PROMPT, max_new_tokens=2).token_ids


def test_options_reach_the_server(gguf):
    options = {"n_parallel": 2, "type_k": "q8_0", "type_v": "q8_0", "swa_full": True, "mmap": False, "threads": 1}
    with load(gguf, engine_options=options) as session:
        assert session.engine.server.client.json("/props")["total_slots"] == 2
        assert session.generate(PROMPT, max_new_tokens=8).token_ids


@pytest.mark.parametrize("options", [{"ngram_type": "mod"}, {"ngram_size": 3}])
@pytest.mark.parametrize("drafter", ["tiny-e2b-assistant", None])
def test_options_of_ngrams_without_ngrams(gguf, options, drafter):
    with pytest.raises(
        InvalidRequestError, match=f"{next(iter(options))!r} has no effect: drafters of kind ngram use it"
    ):
        load(gguf, drafter=drafter, engine_options=options)


def test_more_tokens_to_look_up_than_to_draft(gguf):
    with pytest.raises(InvalidRequestError, match="ngram_size is 5, and k 3"):
        load(gguf, drafter="ngram", num_speculative_tokens=3, engine_options={"ngram_size": 5})


def test_full_caches_of_a_model_without_sliding_windows(gguf):
    for name, told in (("tiny-llama", 1), ("tiny-e2b", 0)):
        with load(gguf, name, None, engine_options={"swa_full": True}) as session:
            assert sum("swa_full has no effect" in note for note in session.running.notes) == told


def test_closing_frees_everything(gguf):
    tasks = Path("/proc/self/task")
    before = len([*tasks.iterdir()]) if tasks.is_dir() else 0
    with load(gguf) as session:
        session.generate(PROMPT, max_new_tokens=2, speculate="off")
        stream = session.stream(PROMPT, max_new_tokens=400, ignore_eos=True)
        next(stream)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    if before:
        assert len([*tasks.iterdir()]) <= before + 1


APP = """
import os, signal, sys, threading, time
import polydraft
session = polydraft.load(sys.argv[1], backend="xllamacpp", drafter=None, device="cpu", context_length=256)
child = os.fork()
if child == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert session.generate([2, 300], max_new_tokens=4).token_ids
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_forks_ctrl_c_and_an_exit_without_close(gguf):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", APP, str(gguf("tiny-llama"))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_an_output_that_ends_inside_a_character(gguf):
    """The server's stream lacks the tokens of a character that is not complete."""
    with load(gguf, "tiny-llama", None) as session:
        first = session.tokenizer.encode("☃")[0]
        result = session.generate([2, 300], max_new_tokens=3, logit_bias={first: 100.0}, ignore_eos=True)
    assert result.token_ids == (first,) * 3


def test_outputs_that_must_match(gguf):
    schema = {
        "type": "object",
        "properties": {
            "größe": {"enum": ["groß", 'a "b"\\', None]},
            "n": {"type": "integer", "minimum": -12, "exclusiveMaximum": 305},
            "list": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
            "no": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]},
            "code": {"type": "string", "pattern": r'^(?:[A-Zé🚀"\\]{2}|x\n){1,2}-\d{1,3}$'},
            "at": {"type": "string", "format": "date-time"},
        },
        "required": ["größe", "n", "code", "at"],
        "additionalProperties": False,
        "$defs": {"pair": {"type": "object", "properties": {"x": {"const": 1.5}}}},
    }
    with load(gguf, drafter="ngram") as loaded:
        for seed in range(6):
            given = {"temperature": 1.5, "seed": seed, "max_new_tokens": 200}
            result = loaded.generate("x = ", guided={"json": schema}, **given)
            assert result.matches, result.text
            found = json.loads(result.text)
            assert found["größe"] in ("groß", 'a "b"\\', None)
            assert -12 <= found["n"] < 305
            assert all(len(one) <= 3 for one in found.get("list", ["a"]))
            assert found.get("no") in (None, {}, {"x": 1.5})
            assert re.search(schema["properties"]["code"]["pattern"], found["code"])
            datetime.date.fromisoformat(found["at"][:10])
        text = loaded.generate("x = ", guided={"regex": r"(?:é|[^\s\d]){2}\s(?:a{2}){1,2}"}, **given).text
        assert re.fullmatch(r"\D{2}\s(?:aa){1,2}", text), text
        assert loaded.generate("x = ", guided={"choice": ["größer", "\x08"]}, max_new_tokens=20).text in (
            "größer",
            "\x08",
        )
        for refused in ({"regex": r"\bx"}, {"grammar": "start: /a/"}, {"json": {"type": "string", "format": "email"}}):
            with pytest.raises(UnsupportedError):
                loaded.stream("x = ", guided=refused)
        many = {"properties": {f"p{at}": {"type": "boolean"} for at in range(300)}, "required": ["p7", "p250"]}
        result = loaded.generate("x = ", guided={"json": many}, max_new_tokens=3000, temperature=1.0, seed=1)
        assert not result.matches or {"p7", "p250"} <= json.loads(result.text).keys()
        for broken in ("root ::= x\n", 'root ::= root "a" | "b"\n', 'x ::= "a"\n', 'root ::= "a"{100000}\n'):
            with pytest.raises(InvalidRequestError, match="cannot be read"):
                loaded.generate("x = ", guided={"grammar": broken}, max_new_tokens=2)
        assert loaded.generate("x = ", guided={"grammar": 'root ::= "a"\n'}, max_new_tokens=20).text == "a"
        with pytest.raises(InvalidRequestError, match="no number matches"):
            loaded.stream("x = ", guided={"json": {"type": "integer", "minimum": 3, "maximum": 2}})


def test_characters_that_are_spread_over_tokens(gguf):
    prompt = "# größe für übung schöne grüße für größe übung\nx = 'größe für übung schöne grüße für gr"
    with load(gguf, drafter="ngram") as loaded:
        for settings in ({}, {"speculate": "off"}):
            assert loaded.generate(prompt, max_new_tokens=12, **settings).text.startswith("öße für g")
        with pytest.raises(UnsupportedError, match="no log-probabilities for a character"):
            loaded.generate(prompt, max_new_tokens=12, logprobs=1)
    assert split_characters_lack_logprobs()
