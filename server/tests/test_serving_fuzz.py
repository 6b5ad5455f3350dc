"""Whatever is sent, the answer is a right one or a clear error: never a 500, and never nothing."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

FIELDS = (
    *(
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "stop",
        "seed",
        "temperature",
        "top_p",
    ),
    *("top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("logprobs", "top_logprobs", "stream", "stream_options", "tools", "tool_choice", "response_format", "user"),
    *("speculate", "num_speculative_tokens", "echo", "best_of", "min_tokens", "stop_token_ids", "ignore_eos"),
    *("chat_template_kwargs", "reasoning_effort", "return_token_ids", "continue_final_message", "unknown"),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 300),
    st.integers(),
    st.floats(allow_nan=True),
    st.text(max_size=20),
    st.sampled_from(["auto", "on", "off", "user", "assistant", "tool", "text", "builtin:toy", "\ud800", "json_object"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["role", "content", "type", "text", "function", "name", "65"]), st.text(max_size=8)
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
GOOD = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "max_tokens": 3, "temperature": 0.5, "n": 2}
BODIES = st.builds(
    lambda kept, drawn: {**{name: GOOD[name] for name in kept}, **drawn},
    st.sets(st.sampled_from(sorted(GOOD))),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)


def check(done):
    if done.status == 200:
        if done.headers["content-type"].startswith("text/event-stream"):
            assert done.events
        else:
            assert done.json["choices"]
        return
    assert 400 <= done.status < 500, done.body
    assert done.error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
def test_any_fields(quick, path, body):
    check(quick.post(path, json.dumps({"max_tokens": 3, **body}).encode()))


@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes(quick, body):
    check(quick.post("/v1/completions", body))


@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]),
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30),
)
def test_any_path(quick, method, path):
    done = quick.ask(method, f"/{path}")
    assert done.status < 500
    assert method == "HEAD" or done.status < 400 or done.error["message"]


@pytest.fixture(scope="module")
def quick():
    """A server whose answers are short whatever is asked for."""
    import polydraft
    from serving import serving

    load = {"backend": "reference", "isolation": "none", "context_length": 128}
    with serving(polydraft.load("builtin:toy", **load)) as server:
        yield server
