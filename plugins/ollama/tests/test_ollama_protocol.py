"""The backend against a stand-in that speaks Ollama's API: what it sends, what it makes of answers, and of bad ones."""

import json
import re
import threading
import time
from types import SimpleNamespace

import polydraft
import pytest
from polydraft._cli.render.verification import case_line, verification_summary
from polydraft.contract import ChosenBy, SpeculationPlan
from polydraft.errors import (
    BackendUnavailableError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft.verification._command import verify
from polydraft_ollama.backend import OllamaBackend
from polydraft_ollama.client import OllamaClient
from polydraft_ollama.loading import _speculation
from polydraft_ollama.model import digest_of, served_model
from polydraft_ollama.options import OllamaOptions

CREATED = "2023-08-04T08:52:19.385406455-07:00"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]


def load(name="gemma4:e2b", **arguments):
    return polydraft.load(name, backend="ollama", **arguments)


def answering(*lines, ended=True):
    """A script: these lines, as bytes or JSON."""

    def script(handler):
        handler.start()
        for line in lines:
            handler.line(line)
        if ended:
            handler.end()
        else:
            handler.close_connection = True

    return script


def dying(handler):
    """Half of what it has announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "999")
    handler.end_headers()
    handler.wfile.write(b'{"response": "Yes", "done": false}\n{"resp')
    handler.close_connection = True


def piece(text, **further):
    return {"model": "gemma4:e2b", "created_at": CREATED, "response": text, "done": False, **further}


DONE = {
    "model": "gemma4:e2b",
    "created_at": CREATED,
    "response": "",
    "done": True,
    "done_reason": "stop",
    "eval_count": 3,
}


def test_text_with_and_without_drafts(server):
    with load(num_speculative_tokens=3) as session:
        drafted = session.generate("Why is", max_new_tokens=12)
        plain = session.generate("Why is", max_new_tokens=12, speculate="off")
    running, stats = session.running, drafted.stats
    assert drafted.text == plain.text
    assert (running.method, running.num_speculative_tokens, running.drafter) == ("mtp", 3, None)
    assert (running.engine_version, running.dtype, running.context_length) == ("0.32.14", "Q4_K_M", 8192)
    assert drafted.finish_reason == "length"
    assert stats.num_tokens == 12
    assert (stats.acceptance_rate, stats.num_draft_tokens, stats.num_drafts) == (None, None, None)
    assert (stats.prefill_seconds, stats.decode_seconds) == (0.002, 0.003)
    assert plain.stats.num_draft_tokens == 0
    assert plain.speculation_off.code == "caller"
    first, second = server.bodies("/api/generate")
    assert (first["options"]["draft_num_predict"], second["options"]["draft_num_predict"]) == (3, 0)
    assert (first["prompt"], first["raw"], first["stream"]) == ("Why is", True, True)


def test_settings_by_its_names(server):
    with load(context_length=1024, device="cpu", engine_options={"keep_alive": "10m", "num_thread": 2}) as session:
        session.generate("x", max_new_tokens=5, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, seed=7)
    (body,) = server.bodies("/api/generate")
    assert body["keep_alive"] == "10m"
    assert body["options"] == {
        "num_ctx": 1024,
        "num_gpu": 0,
        "num_thread": 2,
        "draft_num_predict": 4,
        "num_predict": 5,
        "seed": 7,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.8,
        "min_p": 0.1,
        "typical_p": 1.0,
        "repeat_penalty": 1.0,
        "repeat_last_n": -1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
    }


def test_a_modelfiles_stop_strings_belong_to_its_chats(server):
    with load() as session:
        session.generate([{"role": "user", "content": "x"}], max_new_tokens=5)
    assert "stop" not in server.bodies("/api/chat")[0]["options"]


@pytest.mark.parametrize(
    ("given", "sent"), [("10m", "10m"), ("1h1.5s", "1h1.5s"), ("300", 300.0), ("-1", -1.0), (-1, -1.0), (0, 0.0)]
)
def test_keep_alive(server, given, sent):
    with load(engine_options={"keep_alive": given}) as session:
        session.generate("x", max_new_tokens=5)
    assert server.bodies("/api/generate")[0]["keep_alive"] == sent


@pytest.mark.parametrize("given", ["forever", "5 m", "", "nan", float("inf")])
def test_keep_alive_that_is_no_time(server, given):
    with pytest.raises(InvalidRequestError, match=r"keep_alive.*not a duration"):
        load(engine_options={"keep_alive": given})


@pytest.mark.parametrize(
    "setting",
    [{"logprobs": 1}, {"presence_penalty": 1.0}, {"logit_bias": {1: 1.0}}, {"min_new_tokens": 2}, {"ignore_eos": True}],
)
def test_the_rest_is_refused(server, setting):
    with load() as session, pytest.raises(UnsupportedError, match=next(iter(setting))):
        session.generate("x", **setting)
    assert not server.bodies("/api/generate")


def test_a_chat_with_thinking_and_a_call(server):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call1", "content": "11 degrees"},
    ]

    def told(**message):
        return {"created_at": CREATED, "message": {"role": "assistant", **message}, "done": False}

    server.scripts["/api/chat"] = answering(
        told(content="", thinking="Let me"),
        told(content="", thinking=" see."),
        told(content="It is <think> "),
        told(content="warm."),
        told(content="", tool_calls=[{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]),
        {"created_at": CREATED, "done": True, "eval_count": 21},
    )
    with load() as session:
        result = session.generate(messages, tools=TOOLS, chat_template_kwargs={"enable_thinking": True})
    assert (result.text, result.thinking) == ("It is <think> warm.", "Let me see.")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert (result.finish_reason, result.stats.num_tokens) == ("eos", 21)
    (body,) = server.bodies("/api/chat")
    assert body["think"] is True
    assert body["tools"][0]["function"]["name"] == "get_weather"
    assert body["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {}}}],
        },
        {"role": "tool", "content": "11 degrees", "tool_name": "get_weather"},
    ]


def test_many_prompts_at_once_and_stops(server):
    with load() as session:
        results = session.generate_many(["a", "b", "c"], max_new_tokens=20)
        alone = [session.generate(text, max_new_tokens=20) for text in "abc"]
        assert [one.text for one in results] == [one.text for one in alone]
        word = alone[0].text.split()[3]
        stopped = session.generate("a", max_new_tokens=20, stop=word)
    assert stopped.finish_reason == "stop"
    assert stopped.text == alone[0].text.partition(word)[0]


def test_eos_and_the_end_of_the_context(server):
    server.models["plain:latest"].length = 5
    with load("plain") as session:
        assert session.running.speculation_off.code == "engine"
        result = session.generate("x", max_new_tokens=50)
        assert (result.finish_reason, result.stats.num_tokens, result.stats.num_draft_tokens) == ("eos", 6, 0)
        with pytest.raises(SpeculationUnavailableError, match="polydraft ollama create"):
            session.generate("x", speculate="on")
        server.scripts["/api/generate"] = answering(
            piece("a"), DONE | {"done_reason": "length", "prompt_eval_count": 4092}
        )
        # The server may have loaded the model with a shorter context than the model's own.
        assert session.generate("x", max_new_tokens=50).finish_reason == "context"
        assert session.generate("x", max_new_tokens=3).finish_reason == "length"
        server.scripts.clear()
        with pytest.raises(ContextLengthError, match="prompt is longer"):
            session.generate("x " * 9000)


@pytest.mark.parametrize(
    ("parameters", "arguments", "length"),
    [
        ({}, {}, 8192),
        ({"num_ctx": 64}, {}, 64),
        ({"num_ctx": 9000}, {}, 8192),
        ({"num_ctx": 64}, {"context_length": 99}, 99),
    ],
)
def test_the_length_of_the_context(server, parameters, arguments, length):
    server.models["gemma4:e2b"].parameters = parameters
    with load(**arguments) as session:
        assert session.running.context_length == length
        chooses = [note for note in session.running.notes if "Ollama chooses the length of the context" in note]
        assert len(chooses) == (not parameters)


def test_cancelling_ends_the_request(server):
    server.models["gemma4:e2b"].length = 10**6
    with load() as session:
        stream = session.stream("x", max_new_tokens=10**6)
        next(stream)
        stream.cancel()
        assert [chunk.finish_reason for chunk in stream][-1] == "cancelled"
        assert server.cancelled.wait(5)


def test_cancelling_while_the_server_is_silent(server):
    released = threading.Event()
    server.scripts["/api/generate"] = lambda handler: released.wait(20)
    with load() as session:
        stream = session.stream("x")
        threading.Timer(0.2, stream.cancel).start()
        started = time.monotonic()
        assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
        assert time.monotonic() - started < 3
    released.set()


def test_liberal_in_what_it_takes(server):
    """Unknown fields, missing ones, empty lines, a last line with text and without an end, no content type."""
    server.scripts["/api/generate"] = answering(
        json.dumps(piece("Hé", unknown={"a": [1]}, logprobs=None)).encode() + b"\n\n",
        b'{"response": "l"}\r\n',
        b"{}\n",
        b'{"done": true, "response": "lo", "eval_count": 7.0, "context": [1, 2]}',
    )
    with load() as session:
        result = session.generate("x")
    assert (result.text, result.finish_reason, result.stats.num_tokens) == ("Héllo", "eos", 7)
    assert result.stats.decode_seconds is None


def test_an_answer_without_text(server):
    server.scripts["/api/generate"] = answering(DONE)
    with load() as session:
        result = session.generate("x")
    assert (result.text, result.finish_reason) == ("", "eos")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (answering(piece("Yes"), {"error": "an error was encountered while running the model"}), "while running"),
        (answering(piece("Yes")), "ended its answer before its end"),
        (answering(piece("Yes"), ended=False), "broke|before its end"),
        (dying, "broke"),
        (answering(piece("Yes"), b"{not json}\n"), "not JSON"),
        (answering(piece("Yes"), b"[1]\n"), "not a JSON object"),
        (answering(piece("Yes"), b'{"response": 7}\n'), "response is not text"),
        (answering(piece("Yes"), b'{"done": true, "eval_count": "many"}\n'), "eval_count is not a number"),
        (answering(piece("Yes"), b"x" * 9_000_000), "longer than"),
        (answering(*[piece(" ha")] * 31), "equal pieces"),
        (lambda handler: handler.json("upstream died", 502), "upstream died"),
        (lambda handler: handler.json({"error": "server busy, please try again"}, 503), "busy"),
    ],
)
def test_bad_answers_are_typed_errors_and_the_session_goes_on(server, script, words):
    server.scripts["/api/generate"] = script
    with load() as session:
        with pytest.raises(EngineError, match=words):
            session.generate("x")
        server.scripts.clear()
        assert session.generate("x", max_new_tokens=3).text


@pytest.mark.parametrize("calls", [7, {"function": {"name": "f"}}, [{"function": {"name": "f", "arguments": [1]}}]])
def test_bad_tool_calls(server, calls):
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    server.scripts["/api/chat"] = answering({"message": message, "done": False}, DONE)
    with load() as session, pytest.raises(EngineError, match="tool"):
        session.generate([{"role": "user", "content": "x"}], tools=TOOLS)


def test_the_text_before_an_error_is_kept(server):
    server.scripts["/api/generate"] = answering(piece("Yes"), piece(", I"), {"error": "died"})
    with load() as session, pytest.raises(EngineError) as failed:
        session.generate("x")
    assert failed.value.partial_text == "Yes, I"


@pytest.mark.parametrize(
    ("status", "said", "error"),
    [
        (500, "model requires more system memory (9.0 GiB) than is available (2.0 GiB)", OutOfMemoryError),
        (400, "invalid options: num_ctx", InvalidRequestError),
        (400, "invalid option: draft_num_predict", SpeculationUnavailableError),
        (401, "unauthorized", BackendUnavailableError),
        (403, "ollama cloud is disabled: remote inference is unavailable", BackendUnavailableError),
        (500, "model runner has unexpectedly stopped", EngineError),
        (404, "model 'gemma4:e2b' not found, try pulling it first", ModelNotFoundError),
    ],
)
def test_what_the_server_refuses(server, status, said, error):
    with load() as session:
        server.scripts["/api/generate"] = lambda handler: handler.json({"error": said}, status)
        with pytest.raises(error):
            session.generate("x")


@pytest.mark.parametrize(
    ("status", "key", "words"),
    [
        (401, "", "without an API key. Set the environment variable OLLAMA_API_KEY to it; .* `ollama signin`"),
        (401, "canary", "does not accept the API key. Set the environment variable OLLAMA_API_KEY to the right one"),
        (403, "", "forbids the request: ollama cloud is disabled"),
    ],
)
def test_whom_the_server_refuses(server, monkeypatch, status, key, words):
    monkeypatch.setenv("OLLAMA_API_KEY", key)
    server.scripts["/api/show"] = lambda handler: handler.json({"error": "ollama cloud is disabled"}, status)
    with pytest.raises(BackendUnavailableError, match=words):
        load()


def test_a_slow_server(server):
    server.scripts["/api/generate"] = lambda handler: time.sleep(3)
    with load(engine_options={"read_timeout": 0.3}) as session, pytest.raises(EngineError, match=r"0\.3 seconds"):
        session.generate("x")


def test_an_unknown_model(server):
    with pytest.raises(ModelNotFoundError, match="no model 'qwen3:8b'") as failed:
        load("qwen3:8b")
    assert "It has: gemma4:e2b, plain:latest. Download it: `ollama pull qwen3:8b`" in failed.value.hint


@pytest.mark.parametrize(("name", "known"), [("plain", True), ("Plain:Latest", True), ("ns/plain", False)])
def test_the_digest_of_a_name(server, name, known):
    digest = server.models["plain:latest"].digest
    assert digest_of(OllamaClient(OllamaOptions()), name) == (digest if known else "")


def test_no_server(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    with pytest.raises(BackendUnavailableError, match=r"127\.0\.0\.1:1") as failed:
        load()
    assert "ollama serve" in failed.value.hint


def test_another_server(server):
    server.scripts["/api/version"] = lambda handler: handler.json("404 page not found", 404)
    with pytest.raises(BackendUnavailableError, match="not Ollama"):
        load()


@pytest.mark.parametrize(
    ("version", "drafts"), [("0.29.9", 0), ("0.12.6-3-g1a2b3c4", 0), ("0.30.0-rc1", 4), ("0.0.0", 4), ("unknown", 4)]
)
def test_versions(server, version, drafts):
    server.version = version
    with load() as session:
        assert session.running.num_speculative_tokens == drafts
        assert session.generate("x", max_new_tokens=5).text
    # An old server does not know the option at all.
    assert server.bodies("/api/generate")[0]["options"].get("draft_num_predict", 0) == drafts
    assert ("draft_num_predict" in server.bodies("/api/generate")[0]["options"]) == bool(drafts)


def test_an_old_server_that_is_asked_for_drafts(server):
    server.version = "0.12.3"
    with pytest.raises(SpeculationUnavailableError, match=r"0\.12\.3 has no speculative") as failed:
        load(num_speculative_tokens=4)
    assert "Update it to 0.30.0" in failed.value.hint
    with load() as session, pytest.raises(SpeculationUnavailableError, match=r"0\.30\.0"):
        session.generate("x", speculate="on")


def test_a_server_that_does_not_say_whether_there_is_a_drafter(server):
    server.scripts["/api/show"] = lambda handler: handler.json({"details": {}, "further": 1})
    with load() as session:
        assert session.running.num_speculative_tokens == 4
        assert any("does not say whether" in note for note in session.running.notes)
        session.generate("x", max_new_tokens=9)
    assert server.bodies("/api/generate")[0]["options"]["draft_num_predict"] == 4


def test_drafts_that_are_asked_for_of_a_model_without_a_drafter(server):
    with load("plain", num_speculative_tokens=3) as session:
        assert any("shows no drafter" in note for note in session.running.notes)
        session.generate("x", max_new_tokens=9)
    assert server.bodies("/api/generate")[0]["options"]["draft_num_predict"] == 3


def test_what_a_template_says_is_no_drafter(server):
    said = 'FROM x\nTEMPLATE """Answer:\nDRAFT an answer\n"""\nLICENSE """\nDRAFT of a license\n"""\n'
    server.scripts["/api/show"] = lambda handler: handler.json({"modelfile": said})
    with load() as session:
        assert (session.running.num_speculative_tokens, session.running.speculation_off.code) == (0, "engine")


def test_k_of_the_modelfile(server):
    server.models["gemma4:e2b"].parameters = {"draft_num_predict": 2}
    with load() as session:
        assert session.running.num_speculative_tokens == 2


@pytest.mark.parametrize("k", [0, -1])
def test_a_modelfile_without_drafts(server, k):
    server.models["gemma4:e2b"].parameters = {"draft_num_predict": k}
    with load() as session:
        assert (session.running.num_speculative_tokens, session.running.method) == (0, None)
        assert "sets draft_num_predict to 0" in session.running.speculation_off.message
    with load(num_speculative_tokens=3) as session:
        assert session.running.num_speculative_tokens == 3


def test_a_measured_k_is_not_the_modelfiles(server):
    server.models["gemma4:e2b"].parameters = {"draft_num_predict": 2}
    model = served_model(OllamaClient(OllamaOptions()), "gemma4:e2b")
    for chosen_by, k in (("rule", 2), ("measured", 8), ("caller", 8)):
        request = SimpleNamespace(
            plan=SpeculationPlan(kind="mtp", num_speculative_tokens=8),
            chosen_by=ChosenBy(num_speculative_tokens=chosen_by),
        )
        assert _speculation(request, model, None)[0] == k


def test_few_tokens_do_not_make_the_server_load_the_model_anew(server):
    with load(num_speculative_tokens=3) as session:
        session.generate("x", max_new_tokens=9)
        assert session.generate("x", max_new_tokens=2).stats.num_draft_tokens == 0
    assert [body["options"]["draft_num_predict"] for body in server.bodies("/api/generate")] == [3, 3]


@pytest.mark.parametrize(
    ("kwargs", "think"),
    [
        ({"enable_thinking": False}, False),
        ({"think": "low"}, "low"),
        ({"think": None}, None),
        # As polydraft's server hands on OpenAI's `reasoning_effort`.
        ({"reasoning_effort": "high", "enable_thinking": True}, "high"),
        ({"reasoning_effort": "minimal", "enable_thinking": True}, "low"),
        ({"reasoning_effort": "none", "enable_thinking": False}, False),
    ],
)
def test_thinking(server, kwargs, think):
    with load() as session:
        session.generate([{"role": "user", "content": "x"}], max_new_tokens=3, chat_template_kwargs=kwargs)
    assert server.bodies("/api/chat")[0].get("think") == think


@pytest.mark.parametrize(
    "kwargs",
    [
        {"think": "high", "enable_thinking": False},
        {"think": True, "reasoning_effort": "none"},
        {"think": "low", "reasoning_effort": "high"},
    ],
)
def test_two_values_for_thinking(server, kwargs):
    with load() as session, pytest.raises(InvalidRequestError, match="two values for Ollama's `think`"):
        session.generate([{"role": "user", "content": "x"}], chat_template_kwargs=kwargs)


def test_plain_decoding_is_never_left_to_the_server(server):
    with load(drafter=None) as session:
        session.generate("x", max_new_tokens=2)
    assert [body["options"]["draft_num_predict"] for body in server.bodies("/api/generate")] == [0]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":56789", "http://127.0.0.1:56789"),
        (":0", "http://127.0.0.1:0"),
        ("example.com", "http://example.com:11434"),
        ("example.com:56789/", "http://example.com:56789"),
        ("https://example.com", "https://example.com:443"),
        ("http://example.com/path", "http://example.com:80/path"),
        ("[::]:1234", "http://[::1]:1234"),
        ("fe80::1", "http://[fe80::1]:11434"),
        ('"localhost:1234"', "http://localhost:1234"),
        (" ' localhost ' ", "http://localhost:11434"),
        ("ollama.com", "https://ollama.com:443"),
        ("http://::1/path", "http://[::1]:80/path"),
    ],
)
def test_addresses(monkeypatch, given, url):
    monkeypatch.setenv("OLLAMA_HOST", given)
    assert OllamaOptions().url == url
    assert OllamaOptions(url=given).url == url


@pytest.mark.parametrize("given", ["http://user:hunter2@host", "host:port", "ftp://host", "a b", ":66000"])
def test_addresses_that_are_none(monkeypatch, given):
    monkeypatch.setenv("OLLAMA_HOST", given)
    with pytest.raises(InvalidRequestError, match=r"'url' of ollama is wrong: .* OLLAMA_HOST holds it\.") as failed:
        load()
    assert "hunter2" not in str(failed.value)
    with pytest.raises(InvalidRequestError) as failed:
        load(engine_options={"url": given})
    assert "OLLAMA_HOST" not in str(failed.value)
    found = OllamaBackend().diagnose()
    assert found.usable
    assert found.notes[0].endswith("OLLAMA_HOST holds it.")
    assert "hunter2" not in found.notes[0]


@pytest.mark.parametrize(
    ("option", "argument"),
    [("num_ctx", "context_length"), ("draft_num_predict", "num_speculative_tokens"), ("temperature", "temperature")],
)
def test_what_is_no_engine_option_but_an_argument(server, option, argument):
    with pytest.raises(InvalidRequestError, match=f"no option '{option}'") as failed:
        load(engine_options={option: 5})
    assert failed.value.hint.startswith(f"`{argument}` is an argument of its own. Known options of ollama: ")


def test_what_the_server_says_ends_like_a_sentence(server):
    with load() as session:
        server.scripts["/api/generate"] = lambda handler: handler.json({"error": "boom"}, 500)
        with pytest.raises(EngineError, match=r"failed \(500\): boom\. Look at"):
            session.generate("x")


def test_doctor_says_what_it_found(server, monkeypatch):
    found = OllamaBackend().diagnose()
    assert found.engine_version == "0.32.14"
    assert found.rank == 0
    assert any("gemma4:e2b, plain:latest" in note for note in found.notes)
    server.version = "0.20.1"
    assert any("update it" in note for note in OllamaBackend().diagnose().notes)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    found = OllamaBackend().diagnose()
    assert found.usable
    assert "ollama serve" in found.notes[0]


def test_verify_counts_characters(server):
    server.models["gemma4:e2b"].parameters = {"num_ctx": 64}
    told = []
    found = verify("gemma4:e2b", backend="ollama", time_limit=2, keep=False, progress=told.append)
    assert re.fullmatch(r"EXACT +\d+ characters after 32 of code, greedy", case_line(told[0]))
    assert re.match(
        r"identical: yes   EXACT, \d+ characters of \d+ outputs", verification_summary(found).renderables[0].plain
    )


@pytest.mark.parametrize("arguments", [{}, {"device": "cpu"}])
def test_a_bench_does_not_take_the_clients_memory_for_the_servers(server, arguments):
    found = polydraft.bench("plain", backends=["ollama"], max_new_tokens=4, repeats=1, prompts=["x"], **arguments)
    assert [row.peak_memory_bytes for row in found.rows] == [None, None]
    assert [row.state for row in found.rows] == ["measured", "measured"]
    # Both are one model of the server: taking turns, each call would make it load that anew.
    assert "Not all engines can be loaded at once, so they were measured one after the other." in found.notes


def test_tune_by_the_servers_name(server):
    found = polydraft.tune(
        "gemma4:e2b",
        backends=["ollama"],
        keep=False,
        seconds=1,
        max_new_tokens=4,
        num_speculative_tokens=2,
        prompts=["x"],
    )
    assert {row.backend for row in found.rows} == {"ollama"}
    assert found.target == "gemma4:e2b"


def test_in_a_worker(server):
    with load(isolation="process") as session:
        result = session.generate("x", max_new_tokens=8)
        chat = session.generate([{"role": "user", "content": "Hi"}], max_new_tokens=4)
    assert (result.finish_reason, result.stats.num_tokens, chat.stats.num_tokens) == ("length", 8, 4)
    assert result.text
    assert sum("text, not tokens" in note for note in session.running.notes) == 1


def test_a_key_is_sent_and_not_shown(server, monkeypatch):
    monkeypatch.setenv("OLLAMA_API_KEY", "canary-1234")
    server.scripts["/api/show"] = lambda handler: handler.json({"error": handler.headers["Authorization"]}, 400)
    with pytest.raises(InvalidRequestError) as failed:
        load()
    assert "Bearer ***" in str(failed.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"engine_options": {"start_timeout": 5}}, "start_timeout is for servers that a session starts"),
        ({"engine_options": {"modelfile": "Modelfile"}}, "modelfile is written with create_as"),
        ({"engine_options": {"num_gpu": 0, "main_gpu": 0}}, "main_gpu has no effect with num_gpu=0"),
        ({"engine_options": {"num_gpu": 4}, "device": "cpu"}, "num_gpu is given, and `device='cpu'`"),
        ({"engine_options": {"main_gpu": 0}, "device": "cpu"}, "main_gpu is given, and `device='cpu'`"),
    ],
)
def test_options_that_would_do_nothing(server, asked, words):
    with pytest.raises(InvalidRequestError, match=words):
        load(**asked)
    assert not server.bodies("/api/generate")


def test_a_dtype_for_a_model_that_the_server_has(server):
    with pytest.raises(UnsupportedError, match="`dtype` was given"):
        load(dtype="float16", drafter=None, engine_options={"create_as": "other"})


def test_what_it_keeps_of_earlier_calls_is_its_own(server):
    for given in (0, 5, None):
        with load(prefix_cache_bytes=given) as session:
            told = [note for note in session.running.notes if "has no effect" in note]
        assert [note.split("`")[1] for note in told] == ([] if given is None else [f"prefix_cache_bytes={given}"])


@pytest.mark.parametrize(
    ("version", "told", "counted"),
    [
        ("0.32.14", {"prompt_eval_count": 9}, (9, None)),
        ("0.33.3", {"prompt_eval_count": 9, "prompt_eval_cached_count": 5}, (9, 5)),
        ("0.33.3", {"prompt_eval_count": 9, "prompt_eval_cached_count": 0}, (9, 0)),
        ("0.20.0", {"prompt_eval_count": 9}, (9, None)),
        ("0.30.0", {"prompt_eval_count": 9}, (None, None)),  # without what its cache had
        ("0.30.1-rc0", {"prompt_eval_count": 9}, (9, None)),
        ("0.32.14", {}, (None, None)),
        ("0.32.14", {"prompt_eval_count": 0}, (None, None)),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_tokens_of_the_prompt(server, version, told, counted, chat):
    server.version = version
    done = {key: value for key, value in DONE.items() if key != "response"} | told
    said = {"message": {"role": "assistant", "content": "Yes"}} if chat else {"response": "Yes"}
    server.scripts["/api/chat" if chat else "/api/generate"] = answering({**piece(""), **said}, done)
    with load("plain") as session:
        stats = session.generate([{"role": "user", "content": "x"}] if chat else "x").stats
    assert (stats.num_prompt_tokens, stats.num_reused_tokens) == counted


def test_an_answer_that_the_server_did_not_end_has_no_count(server):
    with load() as session:
        cut = session.generate("x", max_new_tokens=50, stop="e")
        assert cut.finish_reason == "stop"
        assert cut.stats.num_prompt_tokens is None
        assert session.generate("x", max_new_tokens=5).stats.num_prompt_tokens == 7
