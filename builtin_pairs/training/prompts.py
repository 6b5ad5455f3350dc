"""The prompts that ship with the pairs: held-out modules' text in several lengths, and chats about them."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from .chats import LOOKUP, PARAMETERS
from .sources import Source, described
from .tokenizer import ChatTemplate

LENGTHS = (20, 20, 100, 300, 20, 100, 300, 700)
"""Maximum numbers of tokens of the text prompts, used in turn."""
TEXTS = 18
CHATS = 8


def cut(tokenizer: Tokenizer, text: str, start: int, tokens: int) -> str:
    """At most `tokens` tokens of text from the first blank line after `start`, cut between characters."""
    begin = text.find("\n\n", start)
    begin = 0 if start == 0 or begin < 0 else begin + 1
    ids = tokenizer.encode(text[begin:].lstrip("\n"), add_special_tokens=False).ids[:tokens]
    return tokenizer.decode(ids, skip_special_tokens=False).rstrip("�")


def text_prompts(tokenizer: Tokenizer, held: list[Source]) -> list[dict[str, Any]]:
    """Raw texts from different places in different modules."""
    prompts: list[dict[str, Any]] = []
    for index in range(TEXTS):
        source = held[index % len(held)]
        start = (index % 3) * len(source.text) // 4
        text = cut(tokenizer, source.text, start, LENGTHS[index % len(LENGTHS)])
        prompts.append({"id": f"text-{index:02d}", "kind": "text", "source": source.name, "text": text})
    return prompts


def chat_prompts(held: list[Source]) -> list[dict[str, Any]]:
    """Chats about functions of the held-out modules: plain, with a system message, with thinking, with tools."""
    items = [next(iter(described(source)), None) for source in held]
    chosen = [item for item in items if item is not None][:CHATS]
    prompts: list[dict[str, Any]] = []
    for index, item in enumerate(chosen):
        prompt: dict[str, Any] = {
            "id": f"chat-{index:02d}",
            "kind": "chat",
            "source": item.module.replace(".", "/") + ".py",
            "messages": [{"role": "user", "content": f"What does `{item.name}` of the module `{item.module}` do?"}],
        }
        if index in (2, 3):
            prompt["messages"].insert(0, {"role": "system", "content": "You are a helpful assistant."})
        if index in (3, 4):
            prompt["enable_thinking"] = True
        if index == 5:
            prompt["messages"][-1]["content"] = f"Look up {item.name} in {item.module}."
            prompt["tools"] = [LOOKUP]
        if index in (6, 7):
            prompt["messages"][-1]["content"] = f"How many parameters does `{item.signature}` take?"
            prompt["tools"] = [PARAMETERS, LOOKUP]
        prompts.append(prompt)
    return prompts


def build_prompts(tokenizer: Tokenizer, held: list[Source]) -> list[dict[str, Any]]:
    """All prompts, in a fixed order."""
    return [*text_prompts(tokenizer, held), *chat_prompts(held)]


def prompt_ids(tokenizer: Tokenizer, prompt: dict[str, Any]) -> list[int]:
    """Token ids of a prompt, with one `<bos>`."""
    if prompt["kind"] == "text":
        text = "<bos>" + prompt["text"]
    else:
        options = {"tools": prompt.get("tools"), "enable_thinking": prompt.get("enable_thinking", False)}
        text = ChatTemplate()(prompt["messages"], **options)
    return tokenizer.encode(text, add_special_tokens=False).ids
