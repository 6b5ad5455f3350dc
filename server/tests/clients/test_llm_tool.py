"""The `llm` tool, from the shell and as a library, with the server as one of its OpenAI models."""

import json
import os
import subprocess
import sys

import pytest
from asked import CHAT, SHAPE, check_shape

pytest.importorskip("llm", reason="needs llm: `nox -s clients`")

PROMPT = CHAT[0]["content"]
IN_PYTHON = """
import llm

def weather(city: str) -> str:
    "The weather in a city."
    seen.append(city)
    return "Sunny."

seen = []
model = llm.get_model("here")
talk = model.conversation(tools=[weather], chain_limit=2)
response = talk.chain("What is the weather?", stream=STREAM)
try:
    print(response.text())
except ValueError:
    pass  # the limit: the model, which reads nothing, calls again and again
assert seen[0] == "Rome", seen
"""


@pytest.fixture
def shell(tmp_path):
    """Runs a program of its environment; the model `here` is the server's."""

    def run(server, *arguments, name="builtin:toy"):
        here = {"model_id": "here", "model_name": name, "api_base": server.url}
        here |= {"supports_schema": True, "supports_tools": True}
        (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([here]))  # JSON is YAML
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("stream", [[], ["--no-stream"]])
def test_a_prompt(toy, story, shell, stream):
    said = shell(toy[0], "-m", "llm", "-m", "here", PROMPT, "-o", "max_tokens", "30", *stream)
    assert said == f"{story.text}\n"


@pytest.mark.parametrize("stream", [[], ["--no-stream"]])
def test_what_it_logs_has_the_usage(toy, story, shell, stream):
    shell(toy[0], "-m", "llm", "-m", "here", PROMPT, "-o", "max_tokens", "30", *stream)
    (entry,) = json.loads(shell(toy[0], "-m", "llm", "logs", "--json"))
    assert entry["response"] == story.text
    assert entry["output_tokens"] == len(story.token_ids)
    details = json.loads(entry["token_details"])["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == story.stats.num_accepted_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_tools(caller, shell, stream):
    shell(caller, "-c", IN_PYTHON.replace("STREAM", str(stream)), name="scripted")


def test_structured_output(shaping, shell):
    check_shape(json.loads(shell(shaping, "-m", "llm", "-m", "here", PROMPT, "--schema", json.dumps(SHAPE))))
