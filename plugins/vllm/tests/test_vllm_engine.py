"""The in-process engine: batches, chunked prefill, cancelling, statistics, limits, bad input. Real models, in fp32."""

import threading
import time
from contextlib import closing
from pkgutil import resolve_name

import polydraft
import pytest
from packaging.version import Version
from polydraft.errors import (
    ContextLengthError,
    DeviceError,
    EngineError,
    InvalidRequestError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    PolydraftError,
    UnsupportedError,
)
from polydraft_vllm.soundness import REJECTION_SAMPLER, SAMPLER
from polydraft_vllm.versions import installed_vllm

pytest.importorskip("vllm")

PROMPT = "def read_lines(path):\n"
LONG = 'def add(first, second):\n    """Return the sum."""\n    return first + second\n\n\n' * 24
"""Longer than the windows of the built-in targets, and than the batches of the shared session."""
GREEDY = {"max_new_tokens": 48, "ignore_eos": True}
PROMPTS = (PROMPT, "import os\n", LONG, "class Stack:\n    ", "for i in range(10):\n    print(", LONG[100:])


def load(target="builtin:tiny-e2b", **arguments):
    return polydraft.load(target, backend="vllm", **{"dtype": "float32", "num_speculative_tokens": 4, **arguments})


def idle(session):
    """Wait until vLLM has forgotten all requests."""
    deadline = time.monotonic() + 10
    while session.engine.num_unfinished and time.monotonic() < deadline:
        time.sleep(0.02)
    return session.engine.num_unfinished == 0


def test_chunked_prefill_past_the_window_changes_nothing(either):
    assert len(either.generate(LONG, max_new_tokens=1).prompt_token_ids) > 3 * 128
    plain = either.generate(LONG, speculate="off", **GREEDY)
    found = either.generate(LONG, **GREEDY)
    assert found.token_ids == plain.token_ids
    assert found.stats.num_accepted_tokens > 0
    assert plain.stats.num_draft_tokens == 0
    assert plain.speculation_off.code == "caller"


def test_many_at_once_give_what_each_gives_alone(either):
    alone = [either.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
    together = either.generate_many([*PROMPTS] * 4, **GREEDY)
    assert [result.token_ids for result in together] == alone * 4
    assert all(result.stats.num_accepted_tokens > 0 for result in together)
    assert idle(either)


def test_plain_and_speculative_requests_share_a_batch(either):
    wanted = {prompt: either.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS}
    streams = [
        (prompt, speculate, either.stream(prompt, speculate=speculate, **GREEDY))
        for prompt in PROMPTS
        for speculate in ("on", "off")
    ]
    for *_, stream in streams:
        stream.start()
    for prompt, speculate, stream in streams:
        chunks = list(stream)
        assert stream.result.token_ids == wanted[prompt]
        drafted = sum(chunk.num_draft_tokens for chunk in chunks)
        assert (drafted > 0) == (speculate == "on")


def test_greedy_requests_beside_sampled_ones(either):
    """The CPU verifier mixed these up: see the workaround cpu-sampling."""
    wanted = either.generate(PROMPT, **GREEDY).token_ids
    noise = [either.stream(PROMPT, temperature=1.2, top_k=20, top_p=0.9, seed=seed, **GREEDY) for seed in range(6)]
    for stream in noise:
        stream.start()
    assert either.generate(PROMPT, **GREEDY).token_ids == wanted
    for stream in noise:
        for _ in stream:
            pass
    assert len({stream.result.token_ids for stream in noise}) > 1


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}], ids=str)
def test_filters_that_leave_one_token_are_greedy(mtp, filters):
    """Each by itself, from a prefill alone on: see the workaround cpu-top-k."""
    wanted = mtp.generate(PROMPT, **GREEDY).token_ids
    assert mtp.generate(PROMPT, temperature=1.5, seed=1, **filters, **GREEDY).token_ids == wanted


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.3}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.7}], ids=str
)
def test_penalties_count_drafts_as_plain_decoding_counts_tokens(either, penalty):
    bare = either.generate(PROMPT, **GREEDY).token_ids
    plain = either.generate(PROMPT, speculate="off", **penalty, **GREEDY)
    found = either.generate(PROMPT, **penalty, **GREEDY)
    assert found.token_ids == plain.token_ids != bare
    assert found.stats.num_accepted_tokens > 0
    beside = either.generate_many([PROMPT, *PROMPTS], **penalty, **GREEDY)  # rows of a batch keep their own history
    assert beside[0].token_ids == plain.token_ids


def test_batches_are_shared(mtp, monkeypatch):
    """Sixteen at once take hardly more engine steps than one."""
    step, steps = mtp.engine._engine.step, []

    def counting():
        steps.append(1)
        return step()

    monkeypatch.setattr(mtp.engine._engine, "step", counting)
    mtp.generate(PROMPT, **GREEDY)
    one = len(steps)
    steps.clear()
    mtp.generate_many([PROMPT] * 16, **GREEDY)
    assert len(steps) < 2 * one


def test_equal_prompts_of_one_batch_get_noise_of_their_own(mtp):
    settings = {"temperature": 1.2, "seed": 5, **GREEDY}
    first, second, third = mtp.generate_many([PROMPT] * 3, **settings)
    assert len({first.token_ids, second.token_ids, third.token_ids}) == 3
    assert first.token_ids == mtp.generate(PROMPT, **settings).token_ids


def test_a_seed_decides_whatever_parts_a_prompt_comes_in(either):
    """Beside others the parts are smaller: see the workaround cpu-seeds."""
    settings = {"temperature": 1.0, "seed": 3, **GREEDY}
    alone = either.generate(LONG, **settings)
    first, second, *_ = either.generate_many([LONG] * 5, **settings)
    assert first.token_ids == alone.token_ids != second.token_ids
    streams = [either.stream(LONG[40 * index :], **GREEDY) for index in range(4)] + [either.stream(LONG, **settings)]
    for stream in streams:
        stream.start()
    for stream in streams:
        list(stream)
    assert streams[-1].result.token_ids == alone.token_ids


def test_a_closed_stream_is_forgotten(either):
    for read in (0, 1, 3):
        with closing(either.stream(PROMPT, max_new_tokens=2000, ignore_eos=True)) as stream:
            stream.start()
            for _ in range(read):
                next(stream)
        assert idle(either), f"closed after {read} chunks"
    stream = either.stream(PROMPT, max_new_tokens=2000, ignore_eos=True)
    next(stream)
    del stream
    assert idle(either)


def test_cancelling_wakes_a_reader(either):
    stream = either.stream(PROMPT, max_new_tokens=4000, ignore_eos=True)
    next(stream)
    timer = threading.Timer(0.3, either.cancel)
    timer.start()
    chunks = list(stream)
    timer.join()
    assert stream.result.finish_reason == "cancelled"
    assert chunks[-1].finish_reason == "cancelled"
    assert idle(either)


def test_an_unread_stream_goes_on(mtp):
    """The engine works for requests that nobody reads at the moment; their times are its own, not the reader's."""
    stream = mtp.stream(PROMPT, **GREEDY)
    stream.start()
    assert idle(mtp)
    time.sleep(0.5)
    chunks = list(stream)
    assert sum(len(chunk.token_ids) for chunk in chunks) == GREEDY["max_new_tokens"]
    assert stream.result.stats.decode_seconds > 0.01


@pytest.mark.parametrize("stop", [None, "return"])
@pytest.mark.parametrize("fixture", [None, "scheduled_ahead"])
def test_statistics_are_vllms_own(request, fixture, stop):
    """Rounds, drafts and accepted drafts equal what vLLM itself counts for the request, round by round."""
    if installed_vllm().release < Version("0.29"):
        pytest.skip("vLLM counts for single requests since 0.29")
    if fixture is not None:
        request.getfixturevalue(fixture)
    options = {"per_request_spec_decode_metrics": "detailed", "kv_cache_memory_bytes": 1 << 26}
    options["async_scheduling"] = fixture is not None
    with load(context_length=1024, engine_options=options) as session:
        counted = []
        add = session.engine._engine.output_processor.process_outputs

        def spy(outputs, **further):
            counted.extend(output.spec_decode_metrics for output in outputs if output.spec_decode_metrics is not None)
            return add(outputs, **further)

        session.engine._engine.output_processor.process_outputs = spy
        stream = session.stream(PROMPT, stop=stop, **GREEDY)
        chunks = list(stream)
        stats = stream.result.stats
    rounds = [(chunk.num_draft_tokens, chunk.num_accepted_tokens) for chunk in chunks if chunk.num_draft_tokens]
    assert stats.num_drafts == len(rounds)
    assert stats.num_draft_tokens == sum(drafted for drafted, _ in rounds)
    if stream.result.finish_reason == "length":
        own = counted[-1]
        assert rounds == list(zip(own.per_step_drafted, own.per_step_accepted, strict=True))
    else:
        assert counted == []  # vLLM gives none for a request that is aborted at a stop string: counted all the same
        assert stats.num_accepted_tokens == sum(accepted for _, accepted in rounds)


@pytest.mark.parametrize("speculate", ["auto", "off"])
def test_scheduling_ahead_changes_no_round(mtp, ahead, speculate):
    """Drafts past the last token of the output are scheduled there before it is known; none is counted."""

    def rounds(session, prompt, count):
        chunks = session.stream(prompt, max_new_tokens=count, ignore_eos=True, speculate=speculate)
        return [(chunk.token_ids, chunk.num_draft_tokens, chunk.num_accepted_tokens) for chunk in chunks]

    assert "no drafts before `min_new_tokens`" in str(ahead.running.notes)
    kinds = [type(session.engine._scheduler).__name__ for session in (mtp, ahead)]
    assert kinds == ["PolydraftScheduler", "PolydraftAsyncScheduler"]
    for prompt in PROMPTS[:3]:
        for count in (*range(1, 13), 40):
            assert rounds(ahead, prompt, count) == rounds(mtp, prompt, count)


def test_no_step_is_left_when_all_requests_have_ended(ahead):
    """A step that was scheduled before its requests ended would keep their KV."""
    ahead.generate(PROMPT, **GREEDY)
    with closing(ahead.stream(PROMPT, max_new_tokens=2000, ignore_eos=True)) as stream:
        next(stream)
    assert idle(ahead)
    deadline = time.monotonic() + 10
    while ahead.engine._core.batch_queue and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not ahead.engine._core.batch_queue


def test_plain_requests_have_no_drafts_where_vllm_refuses_to_schedule_ahead():
    """On CPU vLLM turns the option off in silence."""
    options = {"async_scheduling": True, "kv_cache_memory_bytes": 1 << 26}
    with load(context_length=512, engine_options=options) as session:
        assert session.generate(PROMPT, speculate="off", **GREEDY).stats.num_draft_tokens == 0


SETTINGS = [
    {},
    {"temperature": 1.0, "seed": 3, "min_p": 0.1},
    {"repetition_penalty": 1.3, "logprobs": 2},
    {"min_new_tokens": 20},
    {"guided": {"regex": "[a-z]{5,20}"}},
]


def test_scheduling_ahead_without_a_drafter(scheduled_ahead):
    """The default on GPUs: it changes no output."""

    def outputs(ahead):
        small = {"context_length": 1024, "engine_options": {"kv_cache_memory_bytes": 1 << 26, **ahead}}
        with load(drafter=None, num_speculative_tokens=None, **small) as session:
            kind = type(session.engine._scheduler).__name__
            results = [session.generate(prompt, max_new_tokens=24, **one) for one in SETTINGS for prompt in PROMPTS[:2]]
        return kind, results

    (kind, found), (other, wanted) = outputs({}), outputs({"async_scheduling": False})
    assert (kind, other) == ("PolydraftAsyncScheduler", "PolydraftScheduler")
    for one, result in zip(wanted, found, strict=True):
        assert (result.text, result.token_ids) == (one.text, one.token_ids)
        for left, right in zip(one.logprobs or (), result.logprobs or (), strict=True):
            assert right.logprob == pytest.approx(left.logprob, abs=1e-4)  # GPUs: each engine chooses its kernels


@pytest.mark.parametrize("settings", [one for one in SETTINGS if "temperature" not in one], ids=str)
def test_scheduling_ahead_with_a_drafter(mtp, ahead, settings):
    for prompt in PROMPTS:
        wanted = mtp.generate(prompt, max_new_tokens=48, speculate="off", **settings)
        found = ahead.generate(prompt, max_new_tokens=48, **settings)
        assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
    assert idle(ahead)


@pytest.mark.parametrize("least", [7, 16])
def test_scheduling_ahead_keeps_min_new_tokens(mtp, ahead, least):
    """vLLM's first model runner counts drafts that are scheduled, and not known yet, as output: it ended too early."""
    ended = 0
    for prompt in PROMPTS[:3]:
        liked = mtp.generate(prompt, speculate="off", **GREEDY).token_ids
        for ends in (liked, liked[:least], liked[: least + 4 : 2]):
            settings = {"max_new_tokens": 40, "min_new_tokens": least, "stop_token_ids": ends}
            wanted = mtp.generate(prompt, speculate="off", **settings)
            ended += least <= len(wanted.token_ids) < 40
            assert ahead.generate(prompt, **settings).token_ids == wanted.token_ids
    assert ended > 3
    assert idle(ahead)


def test_two_engines_and_one_closed(mtp):
    wanted = mtp.generate(PROMPT, **GREEDY).token_ids
    small = {"context_length": 512, "engine_options": {"kv_cache_memory_bytes": 1 << 26}}
    with load(drafter="ngram", **small) as other:
        streams = [session.stream(PROMPT, **GREEDY) for session in (mtp, other, mtp, other)]
        for stream in streams:
            stream.start()
        for stream in streams:
            list(stream)
        assert {stream.result.token_ids for stream in streams} == {wanted}
    assert mtp.generate(PROMPT, **GREEDY).token_ids == wanted


def test_what_vllm_would_change_is_refused(mtp):
    with pytest.raises(UnsupportedError, match="min_p"):
        mtp.generate(PROMPT, min_p=0.1, temperature=1.0)
    with pytest.raises(UnsupportedError, match=r"0\.001 to 0\.01"):
        mtp.generate(PROMPT, temperature=0.001)
    with pytest.raises(UnsupportedError, match="at most 2"):
        mtp.generate(PROMPT, temperature=3.0)
    assert idle(mtp)


def test_min_p_without_a_drafter():
    small = {"context_length": 512, "engine_options": {"kv_cache_memory_bytes": 1 << 26}}
    with load(drafter=None, num_speculative_tokens=None, **small) as session:
        first, second = (
            session.generate(PROMPT, min_p=min_p, temperature=1.5, seed=1, **GREEDY).token_ids for min_p in (0.99, 0.0)
        )
        greedy = session.generate(PROMPT, **GREEDY).token_ids
    assert first == greedy  # only the best token is kept
    assert second != greedy


def test_the_apps_random_state_is_kept():
    import random

    import torch

    random.seed(3)
    torch.manual_seed(3)
    wanted = random.random(), float(torch.rand(()))
    random.seed(3)
    torch.manual_seed(3)
    # These two are engine arguments that polydraft gives other defaults.
    options = {"kv_cache_memory_bytes": 1 << 26, "disable_log_stats": False, "use_tqdm_on_load": True}
    load(context_length=512, engine_options=options).close()
    assert (random.random(), float(torch.rand(()))) == wanted


BAD_LOADS = [
    ({"engine_options": {"speculative_model": "x"}}, InvalidRequestError, "obsolete"),
    ({"engine_options": {"max_num_seq": 3}}, InvalidRequestError, "max_num_seqs"),
    ({"engine_options": {"max_model_len": 100}}, InvalidRequestError, "context_length"),
    ({"engine_options": {"speculative_config": {"method": "mtp"}}}, InvalidRequestError, "method"),
    ({"engine_options": {"data_parallel_size": 2}}, UnsupportedError, "vllm-server"),
    (
        {"engine_options": {"tensor_parallel_size": 2, "speculative_config": {"draft_tensor_parallel_size": 4}}},
        InvalidRequestError,
        "draft_tensor_parallel_size",
    ),
    (
        {"target": "builtin:tiny-llama", "engine_options": {"tensor_parallel_size": 2}},
        InvalidRequestError,
        "3 attention",
    ),
    ({"engine_options": {"tensor_parallel_size": 3}}, InvalidRequestError, "4 att"),
    ({"engine_options": {"kv_cache_memory_bytes": 1000}}, OutOfMemoryError, "kv_cache_memory_bytes"),
    ({"engine_options": {"kv_cache_memory_bytes": 1 << 45}}, OutOfMemoryError, "kv_cache_memory_bytes"),
    ({"context_length": 10**7}, ContextLengthError, "or less"),
    ({"dtype": "float7"}, InvalidRequestError, "float32"),
    ({"device": "cuda:3"}, DeviceError, "cuda:3"),
    ({"exactness": "bitwise"}, UnsupportedError, "standard"),
    ({"num_speculative_tokens": 100}, InvalidRequestError, "16"),
    ({"target": "builtin:tiny-31b", "drafter": "builtin:tiny-e2b-assistant"}, PolydraftError, ""),
    ({"target": "builtin:tiny-31b", "drafter": "builtin:tiny-31b"}, PolydraftError, "ngram"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), BAD_LOADS, ids=[str(row[0])[:60] for row in BAD_LOADS])
def test_bad_loads_are_typed_errors(arguments, error, says):
    with pytest.raises(error) as caught:
        load(**arguments).close()
    assert says in str(caught.value)
    assert caught.value.hint


def spoil(monkeypatch, runner, name, first, bad):
    """Make a logit ``bad`` in all rows from position ``first`` on, in the request whose id starts with ``name``."""

    def spoilt(logits, rows):
        for row, (request_id, position) in enumerate(rows):
            if request_id.startswith(name) and position >= first:
                logits[row, 3] = bad

    def rows_of_first_runner(requests, metadata):
        start = 0
        for index, request_id in enumerate(requests.req_ids):
            rows = 1 if metadata is None else metadata.num_draft_tokens[index] + 1
            known = requests.num_tokens_no_spec[index]
            if metadata is not None:  # with drafts that are scheduled ahead, only the positions on the device are right
                known = int(getattr(runner.positions, "gpu", runner.positions)[metadata.logits_indices[start]]) + 1
            yield from ((request_id, known + place) for place in range(rows))
            start += rows

    def rows_of_second_runner(batch):
        positions = (batch.positions[batch.logits_indices] + 1).tolist()
        ends = batch.cu_num_logits_np.tolist()
        for request_id, start, end in zip(batch.req_ids, ends[:-1], ends[1:], strict=True):
            yield from ((request_id, position) for position in positions[start:end])

    if type(runner).__module__ == "vllm.v1.worker.gpu.model_runner":
        replaced = [resolve_name(path.rpartition(".")[0]) for path in (SAMPLER, REJECTION_SAMPLER)]
    else:
        replaced = [type(runner)]
    for kind in replaced:
        method = "_sample" if kind is type(runner) else "__call__"
        original = getattr(kind, method)

        def sample(self, logits, batch, *further, original=original):
            rows = rows_of_first_runner(runner.input_batch, batch) if self is runner else rows_of_second_runner(batch)
            spoilt(logits, list(rows))
            return original(self, logits, batch, *further)

        monkeypatch.setattr(kind, method, sample)


@pytest.mark.parametrize(("bad", "temperature"), [(float("nan"), 0.0), (float("inf"), 0.8)])
@pytest.mark.parametrize("speculate", ["off", "on"])
@pytest.mark.parametrize("fixture", ["mtp", "ahead"])
def test_logits_that_are_not_finite_end_only_their_request(request, fixture, monkeypatch, bad, speculate, temperature):
    """From output token 10 on, in one request of a batch; the tokens before it are kept."""
    either = request.getfixturevalue(fixture)
    runner = either.engine._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    given = {**GREEDY, "max_new_tokens": 20, "temperature": temperature, "seed": 5, "speculate": speculate}
    sound = [either.generate(prompt, **given) for prompt in PROMPTS[:2]]
    first = len(sound[0].prompt_token_ids) + 10

    spoil(monkeypatch, runner, f"polydraft-{next(either.engine._ids) + 1}", first, bad)
    streams = [either.stream(prompt, **given) for prompt in PROMPTS[:2]]
    for stream in streams:
        stream.start()
    with pytest.raises(NonFiniteLogitsError, match=f"position {first} .*float32") as caught:
        list(streams[0])
    list(streams[1])
    assert streams[0].result.token_ids == sound[0].token_ids[:10]
    assert caught.value.partial_text == streams[0].result.text
    assert streams[1].result.token_ids == sound[1].token_ids
    assert idle(either)


def test_logits_past_the_end_of_the_output_are_none_of_its(either, monkeypatch):
    """Of drafts that are scheduled ahead, some lie past the last token: plain decoding never computes these rows."""
    runner = either.engine._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    for prompt in PROMPTS[:2]:
        whole = either.generate(prompt, max_new_tokens=16, ignore_eos=True)
        for count in range(2, 10):
            with monkeypatch.context() as patch:
                spoil(patch, runner, "polydraft-", len(whole.prompt_token_ids) + count, float("nan"))
                result = either.generate(prompt, max_new_tokens=count, ignore_eos=True)
            assert result.token_ids == whole.token_ids[:count]
    assert idle(either)


def test_a_dead_engine_says_so_and_keeps_the_text():
    """What vLLM raises in a step reaches every caller, with the text so far; the engine then refuses work."""
    with load(context_length=1024, engine_options={"kv_cache_memory_bytes": 1 << 26}) as session:
        stream = session.stream(PROMPT, max_new_tokens=400, ignore_eos=True)
        waiting = session.stream(LONG[:200], max_new_tokens=400, ignore_eos=True)
        waiting.start()
        for _ in range(3):
            next(stream)

        def step():
            raise RuntimeError("out of luck")

        session.engine._engine.step = step
        with pytest.raises(EngineError, match="out of luck") as caught:
            list(stream)
        assert caught.value.partial_text == stream.result.text != ""
        with pytest.raises(EngineError, match="out of luck"):
            list(waiting)
        with pytest.raises(EngineError, match="load the pair again"):
            session.generate(PROMPT, **GREEDY)


def test_a_request_that_lacks_a_library_is_refused_and_others_go_on(mtp, monkeypatch):
    """vLLM imports what structured outputs need with the first of them, of all its ways to make them."""

    def add_request(*_):
        raise ModuleNotFoundError("No module named 'lmformatenforcer'")

    with monkeypatch.context() as patch:
        patch.setattr(mtp.engine._engine, "add_request", add_request)
        with pytest.raises(EngineError, match="lmformatenforcer") as caught:
            mtp.generate(PROMPT, guided={"choice": ["yes", "no"]}, max_new_tokens=8)
    assert "Install vLLM with all that it depends on" in str(caught.value)
    assert mtp.generate(PROMPT, **GREEDY).token_ids
    assert idle(mtp)


def test_a_request_that_kills_the_engine_is_answered_and_so_are_those_behind_it():
    with load(context_length=1024, engine_options={"kv_cache_memory_bytes": 1 << 26}) as session:

        def add_request(*_):
            raise RuntimeError("out of luck")

        session.engine._engine.add_request = add_request
        streams = [session.stream(PROMPT, **GREEDY) for _ in range(3)]
        with session.engine._wake:  # the engine's thread gets all of them at once
            for stream in streams:
                stream.start()
        for stream in streams:
            with pytest.raises(EngineError, match="out of luck"):
                list(stream)
