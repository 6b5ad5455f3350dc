"""What is wrong or not supported is a clear error in OpenAI's shape; what nobody knows is told."""

import json
import time

import pytest
from polydraft.errors import StructuredOutputError
from scripted import Script

USER = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string", "pattern": "x"}}}},
}


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"temperature": -1}, 400, "temperature", "-1"),
        ({"temperature": "hot"}, 400, "temperature", "number"),
        ({"max_tokens": 0}, 400, "max_tokens", "`max_tokens=0`"),
        ({"max_completion_tokens": -3}, 400, "max_completion_tokens", "`max_completion_tokens=-3`"),
        ({"max_tokens": 2.5}, 400, "max_tokens", "integer"),
        ({"n": 0}, 400, "n", "1"),
        ({"n": 500}, 400, "n", "128"),
        ({"top_p": 7}, 400, "top_p", "7"),
        ({"seed": -1}, 400, "seed", "-1"),
        ({"stop": [""]}, 400, "stop", "empty"),
        ({"stop": 5}, 400, "stop", ""),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "'x'"),
        ({"logit_bias": {"9999999": 1}}, 400, "logit_bias", "9999999"),
        ({"logit_bias": {"65": 200}}, 400, "logit_bias", "200"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 65}, 400, "top_logprobs", "`top_logprobs=65`"),
        ({"min_tokens": -1}, 400, "min_tokens", "`min_tokens=-1`"),
        ({"min_tokens": 9}, 400, "min_tokens", "`max_tokens=3`"),
        ({"speculate": "maybe"}, 400, "speculate", "auto"),
        ({"num_speculative_tokens": 99}, 400, "num_speculative_tokens", "99"),
        ({"num_speculative_tokens": 0}, 400, "num_speculative_tokens", "0"),
        ({"messages": []}, 400, "messages", "empty"),
        ({"messages": "Hi"}, 400, "messages", "list"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "content"),
        ({"messages": [{"role": "chef", "content": "x"}]}, 400, "messages", "chef"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, 400, "messages", "surrogate"),
        ({"response_format": {"type": "xml"}}, 400, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "structured_outputs", "regex"),
        ({"guided_regex": "("}, 400, "guided_regex", "regex"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, 400, "guided_regex", "different"),
        ({"tool_choice": "required"}, 400, "tool_choice", "`tools`"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, 400, "tools", "type int"),
        ({"guided_regex": "a{1000000}"}, 400, "guided_regex", "in `guided_regex` cannot be used"),
        ({"functions": [{"name": "f"}]}, 400, "functions", "`tools`"),
        ({"modalities": ["audio"]}, 400, "modalities", "not supported"),
        ({"chat_template": "{{ x }}"}, 400, "chat_template", "template"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, 400, "chat_template_kwargs", "template"),
        ({"model": "gpt-4"}, 404, "model", "builtin:toy"),
        ({"model": "../../etc/passwd"}, 404, "model", "builtin:toy"),
        ({"model": "builtin:tyo"}, 404, "model", "Did you mean `builtin:toy`?"),
        ({"model": "half \ud800"}, 404, "model", "no model"),
        ({"stream": "yes"}, 400, "stream", "boolean"),
        ({"chat_template_kwargs": {"tools": 5}}, 400, "chat_template_kwargs", "tools"),
        ({"messages": USER * 2000}, 400, "messages", "context"),
        ({"tools": [TOOL], "tool_choice": "required"}, 400, "tools", "f.a has the keyword pattern"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests(toy, fields, status, param, says, stream):
    server, _ = toy
    done = server.post("/v1/chat/completions", {"messages": USER, "max_tokens": 3, "stream": stream, **fields})
    assert done.status == status, done.body
    assert says in done.error["message"]
    assert done.error["param"] == param
    assert done.error["type"] == "invalid_request_error"
    assert done.error["code"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": None, "messages": None}, "invalid_type"),
        ({"temperature": "hot"}, "invalid_type"),
        ({"max_tokens": 2.5}, "invalid_type"),
        ({"n": 0}, "invalid_value"),
        ({"speculate": "maybe"}, "invalid_value"),
        ({"top_p": 7}, "invalid_value"),
    ],
)
def test_codes_of_wrong_values(toy, fields, code):
    """OpenAI's."""
    server, _ = toy
    for path, asked in (("chat/completions", {"messages": USER}), ("completions", {"prompt": "x"})):
        assert server.post(f"/v1/{path}", {**asked, **fields}).error["code"] == code
        assert server.post(f"/v1/{path}", {"max_tokens": 1}).error["code"] == "missing_required_parameter"


def test_errors_of_streams_name_the_requests_fields(scripted):
    with scripted(Script(error=StructuredOutputError("`guided` leads nowhere.", "Mend it."))) as server:
        error = server.chat(stream=True).events[-1]["error"]
        assert (error["message"], error["param"]) == ("`response_format` leads nowhere. Mend it.", "response_format")


def test_what_does_not_fit(toy):
    server, _ = toy
    done = server.chat("word " * 5000)
    assert (done.status, done.error["code"]) == (400, "context_length_exceeded")
    done = server.chat("x" * 10_000_000)
    assert (done.status, done.error["code"]) == (413, "request_too_large")
    assert server.chat(max_tokens=1).status == 200


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_images_are_refused(toy, kind):
    server, _ = toy
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:,x"}}]
    done = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert (done.status, done.error["code"]) == (400, "unsupported")
    assert "only text is supported" in done.error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"messages": "\xff"}', "UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not usable as JSON: a number in it has too many digits."),
        (b'{"prompt": "x", "temperature": NaN}', "nan"),
        (b'{"prompt": "x", "max_tokens": 1e400}', "integer"),
        (b'{"max_tokens": 1}', "`prompt` is missing"),
        (b'{"prompt": []}', "empty"),
        (b'{"prompt": [1, "x"]}', "a list of token ids"),
        (b'{"prompt": "x", "\\ud800": 1}', "name of a field is not valid Unicode"),
        (b'{"prompt": [99999]}', "99999"),
        (b'{"prompt": [-1]}', "-1"),
        (b'{"prompt": [[]]}', "empty"),
        (b'{"prompt": "x", "suffix": "y"}', "`suffix` is not supported"),
        (b'{"prompt": "x", "best_of": 3}', "`best_of` is not supported"),
        (b'{"prompt": [65], "echo": true}', "`echo`"),
        (b'{"prompt": "x", "logprobs": 1000}', "1000"),
    ],
)
def test_wrong_bodies(toy, body, says):
    server, _ = toy
    done = server.post("/v1/completions", body)
    assert done.status == 400
    assert says in done.error["message"]


def test_unknown_fields_are_told(toy):
    server, _ = toy
    done = server.chat(max_tokens=1, temprature=0.5, frobnicate=1, user="me", metadata={"a": "b"}, nothing=None)
    assert done.status == 200
    told = done.headers["x-polydraft-ignored"]
    assert told == "frobnicate, temprature (did you mean temperature?)"
    assert "x-polydraft-ignored" not in server.chat(max_tokens=1, n=1, service_tier="auto").headers
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": True}
    told = server.chat(max_tokens=1, stream=True, stream_options=options).headers["x-polydraft-ignored"]
    assert told == "stream_options.continuous_usage_stats"
    odd = server.chat(max_tokens=1, **{"a\r\nSet-Cookie: x": 1, "ü" * 500: 2}, stream=True)
    assert odd.status == 200
    assert "set-cookie" not in odd.headers


def test_very_many_unknown_fields(toy):
    """Some are told. Comparing each with all known ones would keep all clients waiting for seconds."""
    server, _ = toy
    began = time.monotonic()
    done = server.chat(max_tokens=1, **{f"unknown{number}": 1 for number in range(30_000)})
    assert done.headers["x-polydraft-ignored"].count("unknown") == 20
    assert time.monotonic() - began < 5


def test_paths_and_methods(toy):
    server, _ = toy
    done = server.get("/v1/chat/completion")
    assert (done.status, done.error["code"]) == (404, "not_found")
    assert "/v1/chat/completions" in done.error["message"]
    done = server.get("/v1/chat/completions")
    assert (done.status, done.error["code"]) == (405, "method_not_allowed")
    assert done.headers["allow"] == "POST"
    assert server.get("/../../etc/passwd").status == 404
    assert server.get("/v1/models/..%2f..%2fetc%2fpasswd").status == 404


def test_a_backend_that_lacks_a_setting(scripted):
    with scripted() as server:
        done = server.chat(max_tokens=2, top_k=3)
        assert (done.status, done.error["code"]) == (400, "unsupported")
        assert "`top_k`" in done.error["message"]
        assert done.error["param"] == "top_k"


def test_errors_are_counted(toy):
    server, _ = toy
    before = server.metric("polydraft:request_errors_total")
    server.chat(temperature=-1)
    server.get("/nothing")
    assert server.metric("polydraft:request_errors_total") == before + 2


def test_an_engine_that_fails(scripted):
    from polydraft.errors import EngineError
    from scripted import Script

    script = Script(error=EngineError("It broke: /srv/models/secret/weights.bin.", "Look at /var/log/engine/log."))
    with scripted(script) as server:
        done = server.chat()
        assert (done.status, done.error["type"]) == (500, "server_error")
        assert done.error["message"] == "It broke: <path>. Look at <path>."
        events = server.chat(stream=True)
        assert events.status == 200
        assert events.events[-1]["error"]["code"] == "engine_error"
        assert "/srv" not in events.body.decode()
        script.error = None
        assert server.chat(max_tokens=3).status == 200
        assert server.get("/ready").status == 200


def test_defaults_of_the_server():
    import polydraft
    from serving import serving

    load = {"backend": "reference", "isolation": "none"}
    defaults = {"max_new_tokens": 5, "temperature": 0.9, "seed": 1}
    with polydraft.load("builtin:toy", **load) as session:
        expected = session.generate("Hi", **defaults).text
        with serving(polydraft.load("builtin:toy", **load), defaults=defaults, names=("one", "two")) as server:
            assert server.complete(model="two").json["choices"][0]["text"] == expected
            assert server.complete(max_tokens=3).json["usage"]["completion_tokens"] == 3
            assert [one["id"] for one in server.get("/v1/models").json["data"]] == ["one", "two"]
            assert json.loads(server.complete(model="three").body)["error"]["param"] == "model"
