"""Answers are those of the Python API, whole and streamed, and say what the drafts did."""

import json

import polydraft
import pytest
from scripted import CertainAtTheEnd, CountsAtTheEnd, scripted_session
from serving import serving

USAGE = {"stream_options": {"include_usage": True}}
CHAT = [{"role": "user", "content": "Tell me a story."}]
STORY = {"messages": CHAT, "max_tokens": 40, "ignore_eos": True}


def chat(server, **fields):
    done = server.post("/v1/chat/completions", {**STORY, **fields})
    assert done.status == 200, done.body
    return done


def streamed(done):
    """(text of each choice, finish reasons, the last event) of a stream of chat chunks."""
    texts, reasons = {}, {}
    for event in done.events:
        for choice in event["choices"]:
            at = choice["index"]
            texts[at] = texts.get(at, "") + (choice["delta"].get("content") or "")
            reasons[at] = choice["finish_reason"] or reasons.get(at)
    return texts, reasons, done.events[-1]


SAMPLED = {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "presence_penalty": 0.5}


@pytest.mark.parametrize("sampling", [{}, SAMPLED, {"temperature": 1.1, "seed": 2, "logit_bias": {"101": -100}}])
@pytest.mark.parametrize("speculation", [{}, {"speculate": "off"}, {"speculate": "on", "num_speculative_tokens": 2}])
def test_chats_equal_the_python_api(toy, sampling, speculation):
    server, session = toy
    python = {**sampling}
    if "logit_bias" in python:
        python["logit_bias"] = {101: -100}
    expected = session.generate(CHAT, max_new_tokens=40, ignore_eos=True, **python)
    whole = chat(server, **sampling, **speculation).json
    choice = whole["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 40
    assert whole["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    texts, reasons, _ = streamed(chat(server, stream=True, **sampling, **speculation))
    assert texts == {0: expected.text}
    assert reasons == {0: "length"}


def test_speculation_is_reported_in_three_forms(toy):
    server, session = toy
    stats = session.generate(CHAT, max_new_tokens=40, ignore_eos=True).stats
    whole = chat(server).json
    _, _, last = streamed(chat(server, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    for found in (whole, last):
        details = found["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == stats.num_accepted_tokens > 0
        assert details["rejected_prediction_tokens"] == stats.num_draft_tokens - stats.num_accepted_tokens
        metrics = found["metrics"]["speculative_decoding"]
        assert metrics["mean_acceptance_length"] == stats.mean_acceptance_length
        assert metrics["draft_acceptance_rate"] == stats.acceptance_rate
        assert metrics["num_spec_steps"] == stats.num_drafts == sum(metrics["acceptance_histogram"])
        assert metrics["num_accepted_draft_tokens"] == sum(metrics["per_step_accepted"])
        assert metrics["num_draft_tokens"] == sum(metrics["per_step_drafted"])
        assert metrics["num_spec_tokens"] == len(metrics["acceptance_histogram"]) - 1 == 4
    assert whole["choices"][0]["polydraft"]["stats"]["accepted_per_position"] == list(stats.accepted_per_position)


def test_without_speculation_nothing_was_rejected(toy):
    server, _ = toy
    found = chat(server, speculate="off").json
    assert found["metrics"] is None
    assert found["choices"][0]["polydraft"]["speculation_off"] == "caller"
    assert found["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


def test_drafts_that_an_engine_counts_at_the_end():
    """LiteRT-LM and vLLM's server do not tell those of each round: null, and not 0."""
    session = scripted_session(None, engine=CountsAtTheEnd, num_speculative_tokens=3, method="ngram")
    with serving(session) as server:
        for found in (server.complete("Hello").json, server.complete("Hello", stream=True, **USAGE).events[-1]):
            assert found["usage"]["completion_tokens_details"] == {
                "accepted_prediction_tokens": 3,
                "rejected_prediction_tokens": 3,
            }
            assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
            metrics = found["metrics"]["speculative_decoding"]
            assert metrics["acceptance_histogram"] == [1, 1, 1, 0]
            assert (metrics["num_spec_steps"], metrics["mean_acceptance_length"]) == (3, 2)
            assert metrics["per_step_accepted"] is metrics["per_step_drafted"] is None
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") == 6
        assert server.metric("vllm:prefix_cache_hits_total") == 4


def test_turns_tell_the_reused_tokens():
    """Those of a prompt's first answer, and null where the engine does not tell."""
    load = {"backend": "reference", "isolation": "none"}
    with serving(polydraft.load("builtin:toy", **load)) as server:
        first = server.complete([*range(65, 97)], max_tokens=4, ignore_eos=True, return_token_ids=True).json
        assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        turn = [*range(65, 97), *first["choices"][0]["token_ids"][:3], 70]
        usage = server.complete(turn, max_tokens=4, n=2, **USAGE, stream=True).events[-1]["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (36, {"cached_tokens": 35})
        assert server.metric("vllm:prefix_cache_hits_total") >= 35
    with serving(scripted_session("text only")) as server:
        assert server.chat().json["usage"]["prompt_tokens_details"] == {"cached_tokens": None}


def test_chunks_name_every_draft(toy):
    server, session = toy
    result = session.generate(CHAT, max_new_tokens=40, ignore_eos=True)
    rounds = [
        choice["polydraft"]
        for event in chat(server, stream=True).events
        for choice in event["choices"]
        if "token_ids" in choice.get("polydraft", {})
    ]
    assert [token for one in rounds for token in one["token_ids"]] == list(result.token_ids)
    assert "".join(part["text"] for one in rounds for part in one["segments"]) == result.text
    drafted = [draft for one in rounds for draft in one["drafts"]]
    assert len(drafted) == result.stats.num_draft_tokens
    assert sum(draft["accepted"] for draft in drafted) == result.stats.num_accepted_tokens
    for one in rounds:
        accepted = [draft["id"] for draft in one["drafts"] if draft["accepted"]]
        assert accepted == one["token_ids"][: one["num_accepted_tokens"]]
        assert len(one["drafts"]) == one["num_draft_tokens"]
    rejected = [draft for draft in drafted if not draft["accepted"]]
    assert rejected
    assert all(isinstance(draft["text"], str) for draft in rejected)


def test_several_answers(toy):
    server, session = toy
    sampled = {"temperature": 1.0, "seed": 3, "n": 3}
    whole = chat(server, **sampled).json
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    first = session.generate(CHAT, max_new_tokens=40, ignore_eos=True, temperature=1.0, seed=3)
    assert texts[0] == first.text
    assert whole["usage"]["completion_tokens"] == 120
    assert whole["usage"]["prompt_tokens"] == len(first.prompt_token_ids)
    assert streamed(chat(server, stream=True, **sampled))[0] == dict(enumerate(texts))


@pytest.mark.parametrize("stream", [False, True])
def test_completions(toy, stream):
    server, session = toy
    prompts = ["Once upon", "Il était"]
    done = server.complete(prompts, max_tokens=12, stream=stream, echo=True, return_token_ids=True)
    texts = ["", ""]
    for event in done.events if stream else [done.json]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    results = [session.generate(prompt, max_new_tokens=12) for prompt in prompts]
    assert texts == [prompt + result.text for prompt, result in zip(prompts, results, strict=True)]
    ids = server.complete(list(results[0].prompt_token_ids), max_tokens=12, return_token_ids=True).json["choices"][0]
    assert ids["text"] == results[0].text
    assert ids["token_ids"] == list(results[0].token_ids)
    assert ids["prompt_token_ids"] == list(results[0].prompt_token_ids)
    many = server.complete([[256, 65], [256, 66]], max_tokens=3).json["choices"]
    assert [choice["index"] for choice in many] == [0, 1]
    assert len(server.complete("x").json["choices"][0]["text"]) <= 16  # OpenAI's default


def test_prompts_that_are_the_same_count_each(toy):
    """As in OpenAI's API; answers to one prompt do not."""
    server, _ = toy
    once = server.complete("Hello", max_tokens=2).json["usage"]["prompt_tokens"]
    usage = server.complete(["Hello", "Hello"], n=2, max_tokens=2).json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2 * once, 8)


@pytest.mark.parametrize("certain", [True, False])
def test_streams_tell_all_token_ids(certain):
    """Joined they are those of the whole answer; null where they are not certain, or not yet."""
    with serving(scripted_session(certain, engine=CertainAtTheEnd)) as server:
        whole = server.complete(return_token_ids=True).json["choices"][0]
        events = server.complete(return_token_ids=True, stream=True).events
        told = [choice["token_ids"] for event in events for choice in event["choices"]]
        assert whole["token_ids"] == ([65, 66, 67, 68, 257] if certain else None)
        assert told == [[65], None, None, [66, 67, 68, 257] if certain else None]


def test_stops(toy):
    server, session = toy
    text = session.generate(CHAT, max_new_tokens=40, ignore_eos=True).text
    stop = text[10:13]
    expected = text[: text.index(stop)]
    for given in (stop, [stop, "never"]):
        choice = chat(server, stop=given).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
            expected,
            "stop",
            stop,
        )
        assert streamed(chat(server, stop=given, stream=True))[:2] == ({0: expected}, {0: "stop"})
    assert chat(server, max_completion_tokens=3).json["usage"]["completion_tokens"] == 3


def test_logprobs(toy):
    server, session = toy
    expected = session.generate(CHAT, max_new_tokens=5, logprobs=2)
    content = chat(server, max_tokens=5, logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [one.logprob for one in expected.logprobs]
    assert all(bytes(one["bytes"]).decode("utf-8", "replace") == one["token"] for one in content)
    assert [len(one["top_logprobs"]) for one in content] == [2] * 5
    chunks = chat(server, max_tokens=5, logprobs=True, stream=True).events
    told = [
        e for c in chunks for choice in c["choices"] if choice.get("logprobs") for e in choice["logprobs"]["content"]
    ]
    assert [one["logprob"] for one in told] == [one.logprob for one in expected.logprobs]
    found = server.complete("Hi", max_tokens=4, logprobs=3).json["choices"][0]["logprobs"]
    assert {len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {4}


def test_models(toy):
    server, session = toy
    (model,) = server.get("/v1/models").json["data"]
    assert model["id"] == "builtin:toy"
    assert model["max_model_len"] == session.running.context_length
    assert model["polydraft"]["method"] == session.running.method
    assert server.get("/v1/models/builtin:toy").json == model
    assert server.get("/v1/models/builtin:toi").error["code"] == "model_not_found"


def test_metrics_have_vllms_names(toy):
    server, session = toy
    names = (
        *("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total"),
        *("vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total"),
        *("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:request_success_total"),
        *("vllm:time_to_first_token_seconds_count", "vllm:e2e_request_latency_seconds_count"),
        *("vllm:request_queue_time_seconds_count", "polydraft:tokens_per_second_count"),
    )
    before = [server.metric(name) for name in names]
    chat(server)
    stats = session.generate(CHAT, max_new_tokens=40, ignore_eos=True).stats
    grown = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert grown[:3] == [stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens]
    assert grown[3] == sum(stats.accepted_per_position)
    assert grown[4] == 40
    assert grown[6:] == [1] * 5
    assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
    page = server.get("/metrics")
    assert 'position="0"' in page.body.decode()
    assert 'model_name="builtin:toy"' in page.body.decode()


THOUGHT = "<|channel>thought\nHm.<channel|>"
CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("parallel", [True, False])
def test_thinking_and_tool_calls(scripted, parallel):
    from scripted import Script

    script = Script(text=f"{THOUGHT}Let me look.{CALL}{CALL}")
    fields = {"tools": TOOLS, "max_tokens": 200, "parallel_tool_calls": parallel}
    with scripted(script) as server:
        choice = server.chat(**fields).json["choices"][0]
        message = choice["message"]
        assert message["reasoning_content"] == "Hm."
        assert message["content"] == "Let me look."
        assert len(message["tool_calls"]) == 1 + parallel
        for call in message["tool_calls"]:
            assert call["function"]["name"] == "weather"
            assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        assert len({call["id"] for call in message["tool_calls"]}) == 1 + parallel
        assert choice["finish_reason"] == "tool_calls"
        deltas = [one["delta"] for event in server.chat(stream=True, **fields).events for one in event["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["index"] for call in calls] == list(range(1 + parallel))
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
        # The answer, and what the tool said, as the next prompt.
        history = [{"role": "user", "content": "Hi"}, message]
        history += [{"role": "tool", "tool_call_id": call["id"], "content": "Sunny."} for call in message["tool_calls"]]
        again = server.post("/v1/chat/completions", {"messages": history, "tools": TOOLS, "max_tokens": 2})
        assert again.status == 200, again.body
        assert "Sunny." in script.prompts[-1]
        assert server.chat(tools=TOOLS, tool_choice="none", max_tokens=2).status == 200
        assert "weather" not in script.prompts[-1]


def test_what_an_engine_counts_that_gives_text_alone(scripted):
    """Whole and streamed, of both endpoints: a prompt counts once, however many answers it has."""
    wanted = {"prompt_tokens": 7, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    with scripted("counted text", "concurrent") as server:
        for ask in (server.chat, server.complete):
            assert ask().json["usage"].items() >= wanted.items()
            assert ask(**streamed).events[-1]["usage"].items() >= wanted.items()
        assert server.chat(n=3).json["usage"]["prompt_tokens"] == 7
        assert server.complete(["a", "b"], **streamed).events[-1]["usage"]["prompt_tokens"] == 14
        assert server.metric("vllm:prompt_tokens_total") == 7 * (4 + 3 + 2)
        assert server.metric("vllm:prefix_cache_hits_total") == 4 * (4 + 3 + 2)


def test_an_engine_that_gives_text_alone(scripted):
    """What it does not report is null."""
    with scripted("text only") as server:
        for done in (server.chat().json, server.complete().json):
            choice = done["choices"][0]
            assert (choice.get("text") or choice["message"]["content"]) == "Hello!"
            assert done["usage"]["completion_tokens"] == 2
            assert done["usage"]["prompt_tokens"] is None
            assert done["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] is None
            assert done["metrics"] is None
        told = [choice.get("polydraft", {}) for event in server.chat(stream=True).events for choice in event["choices"]]
        rounds = [one for one in told if "drafts" in one]
        assert {(one["token_ids"], one["num_draft_tokens"], one["drafts"]) for one in rounds[:1]} == {
            (None, None, None)
        }
        assert "".join(part["text"] for one in rounds for part in one["segments"]) == "Hello!"
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        assert server.chat(**streamed).events[-1]["usage"]["prompt_tokens"] is None
        assert server.metric("vllm:prompt_tokens_total") == 0
        for fields in ({"prompt": [72]}, {"prompt": "x", "return_token_ids": True}):
            done = server.post("/v1/completions", fields)
            assert (done.status, done.error["code"]) == (400, "unsupported")
