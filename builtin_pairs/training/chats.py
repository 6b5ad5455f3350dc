"""Chat documents made from docstrings: questions and answers, thoughts, tool calls and tool responses."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from .sources import Described
from .tokenizer import ChatTemplate

QUESTIONS = (
    "What does `{name}` of the module `{module}` do?",
    "What is `{module}.{name}` for?",
    "Explain `{signature}` from {module}.",
    "Describe {name} in one sentence.",
    "In Python, what does {signature} do?",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about Python's standard library.",
    "Answer briefly.",
)


def tool(name: str, description: str, /, **parameters: str) -> dict[str, Any]:
    """A tool's declaration; `parameters` are descriptions of required strings."""
    properties = {key: {"type": "string", "description": value} for key, value in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


LOOKUP = tool("lookup", "Looks up the documentation of a Python name.", module="The module", name="The name in it")
PARAMETERS = tool("count_parameters", "Counts the parameters of a Python function.", name="The function")


def question(item: Described, rng: random.Random) -> str:
    """One of the question forms about an item."""
    return rng.choice(QUESTIONS).format(name=item.name, module=item.module, signature=item.signature)


def plain_answer(item: Described, rng: random.Random) -> str:
    """The docstring's first paragraph, sometimes with the code's first lines."""
    if rng.random() < 0.25 and len(item.code) < 600:
        return f"{item.summary}\n\n```python\n{item.code.rstrip()}\n```"
    return item.summary


def thought(item: Described) -> str:
    """A short thought in its channel."""
    count = len(item.parameters)
    listed = f" Its parameters are {', '.join(item.parameters)}." if count else ""
    body = f"The user asks about {item.name}, which is defined in {item.module}.{listed} I should say what it does."
    return f"<|channel>thought\n{body}\n<channel|>"


def chat(item: Described, rng: random.Random, render: ChatTemplate) -> str:
    """One chat document about an item, complete with the model's turn."""
    system = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.35 else []
    messages = [*system, {"role": "user", "content": question(item, rng)}]
    kind = rng.random()
    if kind < 0.55:
        return render(messages) + plain_answer(item, rng) + "<turn|>\n"
    if kind < 0.75:
        return render(messages, enable_thinking=True) + thought(item) + plain_answer(item, rng) + "<turn|>\n"
    thinking = rng.random() < 0.3
    opening = thought(item) if thinking else ""
    if rng.random() < 0.6:
        messages[-1]["content"] = f"Look up {item.name} in {item.module}."
        prompt = render(messages, tools=[LOOKUP], enable_thinking=thinking)
        call = f'<|tool_call>call:lookup{{module:<|"|>{item.module}<|"|>,name:<|"|>{item.name}<|"|>}}<tool_call|>'
        response = f'<|tool_response>response:lookup{{value:<|"|>{item.summary}<|"|>}}<tool_response|>'
        return f"{prompt}{opening}{call}{response}{item.summary}<turn|>\n"
    messages[-1]["content"] = f"How many parameters does `{item.signature}` take?"
    prompt = render(messages, tools=[PARAMETERS, LOOKUP], enable_thinking=thinking)
    call = f'<|tool_call>call:count_parameters{{name:<|"|>{item.name}<|"|>}}<tool_call|>'
    count = len(item.parameters)
    response = f"<|tool_response>response:count_parameters{{value:{count}}}<tool_response|>"
    return f"{prompt}{opening}{call}{response}`{item.name}` takes {count} parameters.<turn|>\n"


def chats(items: Iterable[Described], render: ChatTemplate, *, seed: int) -> Iterator[str]:
    """A chat document for every item; some hold two questions, the first already answered."""
    rng = random.Random(seed)
    previous: Described | None = None
    for item in items:
        text = chat(item, rng, render)
        if previous is not None and rng.random() < 0.15:
            messages = [
                {"role": "user", "content": question(previous, rng)},
                {"role": "assistant", "content": previous.summary},
                {"role": "user", "content": question(item, rng)},
            ]
            text = render(messages) + plain_answer(item, rng) + "<turn|>\n"
        previous = item
        yield text
