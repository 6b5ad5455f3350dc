"""The prompts for scores and tests: texts and chats from modules held out of the training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypedDict, cast

from ._data import ROOT


class Message(TypedDict):
    """One chat message."""

    role: Literal["system", "user"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """One prompt: either raw text or a chat.

    `text` is used raw, with one `<bos>` in front; `messages` go through the model's chat template, with `tools` and
    `enable_thinking`. `source` is the file of the standard library that the prompt comes from.
    """

    id: str
    kind: Literal["text", "chat"]
    source: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    enable_thinking: bool = False


@cache
def prompts() -> tuple[Prompt, ...]:
    """All prompts, in a fixed order: texts, then chats.

    >>> prompts()[0].kind
    'text'
    """
    loaded = cast("list[dict[str, Any]]", json.loads((ROOT / "prompts.json").read_text(encoding="utf-8")))
    return tuple(
        Prompt(**{**item, **{name: tuple(item.get(name, ())) for name in ("messages", "tools")}}) for item in loaded
    )
