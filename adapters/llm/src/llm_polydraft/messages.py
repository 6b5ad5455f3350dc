"""From ``llm``'s messages and tools to chat messages in OpenAI's shapes, as polydraft takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import llm
from llm.parts import AttachmentPart, Message, TextPart, ToolCallPart, ToolResultPart

__all__ = ["to_chat", "to_tools"]


def to_chat(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The conversation up to the new answer. Earlier thinking is left out, as chat templates expect."""
    return [chat for message in messages for chat in _to_chat(message)]


def _to_chat(message: Message) -> Iterator[dict[str, Any]]:
    results = [part for part in message.parts if isinstance(part, ToolResultPart)]
    if any(isinstance(part, AttachmentPart) for part in message.parts) or any(part.attachments for part in results):
        raise llm.ModelError("polydraft's models read text only. Leave the attachment out.")
    for part in results:
        yield {"role": "tool", "tool_call_id": part.tool_call_id, "name": part.name, "content": part.output}
    if message.role == "tool":
        return
    chat: dict[str, Any] = {
        "role": message.role,
        "content": "".join(part.text for part in message.parts if isinstance(part, TextPart)),
    }
    calls = [part for part in message.parts if isinstance(part, ToolCallPart)]
    if calls:
        chat["tool_calls"] = [
            {"id": call.tool_call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    yield chat


def to_tools(tools: Iterable[llm.Tool]) -> list[dict[str, Any]]:
    """The tools' schemas."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]
