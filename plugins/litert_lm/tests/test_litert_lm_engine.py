"""The engine on the built-in pair: what the conformance suite does not ask."""

import hashlib
import json
import lzma
import threading
import time
from pathlib import Path

import polydraft
import pytest
from polydraft._load import prepare
from polydraft.caches import CacheWarning
from polydraft.checkpoints.litertlm import MAGIC, read_litertlm
from polydraft.errors import (
    ContextLengthError,
    DeviceError,
    InvalidRequestError,
    ModelFormatError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft_litert_lm import loading, plugin

TARGET = "builtin:tiny-e2b-litertlm"
EXPECTED = json.loads(Path(__file__).with_name("expected.json").read_text("utf-8"))
PROMPT = "def add(a, b):\n"
LONG = {"max_new_tokens": 60, "ignore_eos": True}


def load(target=TARGET, **arguments):
    return polydraft.load(target, backend="litert_lm", **arguments)


@pytest.fixture(scope="module")
def session():
    with load() as session:
        yield session


@pytest.fixture(scope="session")
def whole():
    (record,) = plugin.polydraft_local_models()
    return lzma.decompress((Path(record.path) / "model.litertlm.xz").read_bytes())


@pytest.fixture
def write(tmp_path):
    def write(data, name="m.litertlm"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def without_drafter(data, write):
    """The same file, whose drafter is marked as deprecated: a change of one byte."""
    for place in range(32, 4096):
        changed = bytearray(data)
        if changed[place] == 3:
            changed[place] = 2
            path = write(bytes(changed))
            try:
                found = read_litertlm(path)
            except ModelFormatError:
                continue
            if not found.has_drafter:
                return path
    raise AssertionError("no such byte")


def test_tokens_are_those_of_transformers(session):
    """Recorded with Transformers in float32 on the same checkpoint: `pair/record.py`."""
    for case in EXPECTED:
        for speculate in ("on", "off"):
            found = session.generate(case["prompt"], max_new_tokens=case["max_new_tokens"], speculate=speculate)
            assert list(found.prompt_token_ids) == case["prompt_token_ids"]
            assert list(found.token_ids) == case["token_ids"], (case["prompt"], speculate)


def test_drafts_change_nothing_and_are_counted(session):
    found = session.generate(PROMPT, **LONG, speculate="on")
    plain = session.generate(PROMPT, **LONG, speculate="off")
    assert (found.token_ids, found.text) == (plain.token_ids, plain.text)
    stats = found.stats
    assert stats.num_draft_tokens == 4 * stats.num_drafts
    assert 0 < stats.num_accepted_tokens == sum(stats.accepted_per_position)
    assert (plain.stats.num_draft_tokens, plain.stats.num_target_steps) == (0, 59)


def test_ids_that_are_not_certain_are_none(session, monkeypatch):
    """They are certain once LiteRT-LM has counted as many tokens."""
    stream = session.stream(PROMPT, **LONG, speculate="on")
    assert {chunk.token_ids for chunk in stream} == {None}
    assert len(stream.result.token_ids) == 60
    assert all(chunk.token_ids for chunk in session.stream(PROMPT, max_new_tokens=9, speculate="off"))
    stopped = session.generate(PROMPT, **LONG, stop=["a.split"])  # LiteRT-LM was interrupted: it counts otherwise then
    assert (stopped.token_ids, stopped.stats.num_accepted_tokens) == (None, None)
    spelled = session.tokenizer.spelled
    # As where the model wrote two tokens, and the tokenizer makes one of their text.
    monkeypatch.setattr(session.tokenizer, "spelled", lambda text: [*spelled(text)][:1])
    found = session.generate(PROMPT, **LONG)
    assert (found.token_ids, found.stats.num_accepted_tokens) == (None, None)


def test_a_temperature_is_decoded_plainly_or_refused(session):
    with pytest.raises(SpeculationUnavailableError, match="ignores the temperature and the seed"):
        session.generate(PROMPT, **LONG, temperature=0.7, speculate="on")
    samples = [session.generate(PROMPT, **LONG, temperature=0.9, seed=seed) for seed in (5, 5, 6)]
    assert {sample.speculation_off.code for sample in samples} == {"settings"}
    assert samples[0].token_ids == samples[1].token_ids != samples[2].token_ids
    greedy = session.generate(PROMPT, **LONG, speculate="off")
    assert greedy.token_ids not in {sample.token_ids for sample in samples}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert session.generate(PROMPT, **LONG, temperature=0.9, **narrow).token_ids == greedy.token_ids


def test_chats_and_texts(session):
    chat = [{"role": "user", "content": "What is a list?"}]
    result = session.generate(chat, max_new_tokens=24)
    assert result.prompt_token_ids[0] == session.tokenizer.bos_token_id
    assert "<|turn>user\nWhat is a list?<turn|>" in "".join(
        session.tokenizer.token_bytes(token).decode() for token in result.prompt_token_ids
    )
    stopped = session.generate(PROMPT, **LONG, stop=["a.split"])
    assert (stopped.finish_reason, stopped.stop_match) == ("stop", "a.split")
    assert "a.split" not in stopped.text


def test_ids_that_text_cannot_give_are_refused(session):
    text = session.tokenizer.encode(PROMPT)
    bos = session.tokenizer.bos_token_id
    halves = [session.tokenizer.token_id(token) for token in ("r", "e")]
    found = session.generate([bos, *text, *halves], max_new_tokens=4)  # one token in a text: in parts it is two
    assert found.prompt_token_ids[-2:] == tuple(halves)
    with pytest.raises(UnsupportedError, match="begins every prompt with '<bos>'"):
        session.generate(text, max_new_tokens=4)
    with pytest.raises(InvalidRequestError, match="U\\+0000"):
        session.generate("a\0b", max_new_tokens=4)
    lone = session.tokenizer.token_id("<0xE2>")
    if lone is not None:
        with pytest.raises(UnsupportedError, match="makes other tokens of"):
            session.generate([bos, lone], max_new_tokens=4)


def test_cancelling_from_another_thread(session):
    stream = session.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)
    threading.Timer(0.05, stream.cancel).start()
    started = time.monotonic()
    chunks = list(stream)
    assert stream.result.finish_reason == "cancelled"
    assert time.monotonic() - started < 5
    assert len(chunks) < 900
    assert session.generate(PROMPT, max_new_tokens=4).token_ids
    assert not [thread for thread in threading.enumerate() if thread.name == "polydraft-litert-lm"]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="no device 'cuda'"):
        load(device="cuda")
    with pytest.raises(UnsupportedError, match=r"weights of .* are float32"):
        load(dtype="bfloat16")
    request = prepare(TARGET, backend="litert_lm", engine_options={"threads": 2}).request
    with pytest.raises(InvalidRequestError, match="threads is 2, and the model runs on the GPU"):
        loading.load_pair(request.model_copy(update={"device": "gpu"}))
    with pytest.raises(InvalidRequestError, match="always drafts 4 tokens"):
        load(num_speculative_tokens=3)
    with pytest.raises(ContextLengthError):
        load(context_length=1 << 20)
    with load(drafter=None, engine_options={"threads": 1, "cache_dir": tmp_path / "a" / "b"}) as session:
        assert (tmp_path / "a" / "b").is_dir()
        assert session.running.speculation_off.code == "caller"
        assert session.generate(PROMPT, max_new_tokens=4).token_ids
        with pytest.raises(SpeculationUnavailableError):
            session.generate(PROMPT, max_new_tokens=4, speculate="on")


def test_without_a_cache_it_runs_and_keeps_nothing(write, monkeypatch, whole):
    model, nowhere = write(whole), write(b"a file", "cache")
    monkeypatch.setenv("POLYDRAFT_LITERT_LM_CACHE", str(nowhere / "folder"))
    for target in (TARGET, model):
        with pytest.warns(CacheWarning, match="Set POLYDRAFT_LITERT_LM_CACHE to a folder"), load(target) as session:
            assert session.generate(PROMPT, max_new_tokens=4).token_ids
    assert sorted(path.name for path in model.parent.iterdir()) == ["cache", "m.litertlm"]
    with pytest.raises(InvalidRequestError, match="cannot be made: Not a directory"):
        load(model, engine_options={"cache_dir": nowhere / "folder"})


def test_files_as_they_come(whole, write):
    with load(write(whole)) as session:
        assert (session.running.method, session.running.num_speculative_tokens) == ("mtp", 4)
    with load(without_drafter(whole, write)) as session:
        assert session.running.speculation_off.code == "no-drafter"
        with pytest.raises(SpeculationUnavailableError):
            session.generate(PROMPT, max_new_tokens=4, speculate="on")
    for data, message in (
        (whole[:-1], "cut short"),
        (b"GGUF" + whole[4:], "not a LiteRT-LM file"),
        (MAGIC + b"\7" + whole[9:], r"version 7\."),
        (b"", "not a LiteRT-LM file"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            load(write(data))


def test_a_file_from_the_hub_is_checked_after_the_download(whole, write, monkeypatch):
    """Then the core has planned with what the registry says of it."""
    path = without_drafter(whole, write)
    monkeypatch.setattr(loading, "fetch_litertlm", lambda source, hub: path)
    from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan

    def request(**plan):
        target = ModelSource(id="litert-community/x", kind="hub", format="litertlm")
        return LoadRequest(backend="litert_lm", target=target, plan=SpeculationPlan(kind="mtp", **plan))

    with pytest.raises(SpeculationUnavailableError, match="holds no drafter"):
        loading.load_pair(request(num_speculative_tokens=4))
    monkeypatch.setattr(loading, "fetch_litertlm", lambda source, hub: write(whole))
    with pytest.raises(InvalidRequestError, match="always drafts 4 tokens"):
        loading.load_pair(request(num_speculative_tokens=2, k_chosen_by="caller"))
    engine = loading.load_pair(request(num_speculative_tokens=2, k_chosen_by="recommended"))
    engine.close()
    assert engine.running.num_speculative_tokens == 4


def test_drafts_still_ignore_the_temperature():
    """Once this fails, calls with a temperature need not be decoded plainly: see `speculation_conflict`."""
    from polydraft_litert_lm.probes import drafts_ignore_the_temperature

    assert drafts_ignore_the_temperature()


def test_the_pair_is_the_one_that_was_checked_in():
    (record,) = plugin.polydraft_local_models()
    folder = Path(record.path)
    digest, _, name = (folder / "SHA256SUMS").read_text("utf-8").strip().partition("  ")
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert (folder / name).stat().st_size < 6_000_000


def test_a_sweep_has_the_files_k_only():
    found = polydraft.bench(TARGET, sweep_k=True, max_new_tokens=4, repeats=1, prompts=[PROMPT])
    assert [(row.num_speculative_tokens, row.state) for row in found.rows] == [(0, "measured"), (4, "measured")]
