"""What a chat template does with messages that templates treat differently, found by rendering short ones.

Only where templates disagree: some render only text as content and some only lists of parts, some render tool calls
only next to empty text and some only next to None, and some render no tools. Whatever a template does not expect it
leaves out without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from polydraft.errors import PolydraftError, UnsupportedError
from polydraft.text._templates import OverLimitsError

__all__ = ["Habits", "PromptEncoder", "render"]

_NEEDLE = "polydraft_needle"
_USER = {"role": "user", "content": _NEEDLE}
_CALL = {"id": "call00001", "type": "function", "function": {"name": _NEEDLE, "arguments": {"x": "y"}}}
_MOST_TEMPLATES = 16  # a caller may give a template of its own with every call

Habits = dict[tuple[str, bool], dict[str, Any]]
"""What was found, to be used again: choice of a template -> name of a habit -> habit."""


class PromptEncoder(Protocol):
    """The part of a ``polydraft.contract.Tokenizer`` that encodes prompts."""

    @property
    def bos_token_id(self) -> int | None:
        """Beginning-of-sequence id; None if the model has none."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an added BOS."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token."""

    def chat(
        self, messages: Any, *, tools: Any = None, template_kwargs: Any = None, continue_final_message: bool = False
    ) -> list[int]:
        """Token ids of the messages through the model's chat template."""


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PromptEncoder,
    *,
    tools: Sequence[dict[str, Any]] | None,
    template_kwargs: Mapping[str, Any] | None,
    continue_final_message: bool,
    habits: Habits,
) -> list[int]:
    """Token ids of normalised messages, their content in the form that the template renders: text, parts or None.

    Args:
        messages: The messages.
        tokenizer: The target's tokenizer.
        tools: The normalised tools.
        template_kwargs: Variables for the template.
        continue_final_message: End with the text of the last message.
        habits: What is known of this tokenizer's templates; what is found is added.

    Raises:
        UnsupportedError: The template leaves out the tools or the tool calls.
    """
    template = _Template(tokenizer, tools, template_kwargs, habits)
    shaped = [{**message, "content": template.content(message["content"])} for message in messages]
    for message in shaped:
        if message.get("tool_calls") and not message["content"]:
            message["content"] = template.empty_content()
    token_ids = tokenizer.chat(
        shaped, tools=tools, template_kwargs=template_kwargs, continue_final_message=continue_final_message
    )
    if tools:
        template.check_tools(shaped, token_ids, continue_final_message=continue_final_message)
    return token_ids


class _Template:
    """The template that the tokenizer chooses for these arguments."""

    def __init__(
        self, tokenizer: PromptEncoder, tools: Any, template_kwargs: Mapping[str, Any] | None, known: Habits
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._template_kwargs = template_kwargs
        if len(known) > _MOST_TEMPLATES:
            known.clear()
        self._habits = known.setdefault((str((template_kwargs or {}).get("chat_template")), bool(tools)), {})

    def content(self, text: str) -> Any:
        """Text as this template takes it."""
        if "parts" not in self._habits:
            parts = {**_USER, "content": [{"type": "text", "text": _NEEDLE}]}
            # Both: text. Neither, as when a template refuses a lone user message: text, and it says why.
            self._habits["parts"] = not self._shows([_USER]) and self._shows([parts])
        if not self._habits["parts"]:
            return text
        return [{"type": "text", "text": text}] if text else []

    def empty_content(self) -> Any:
        """The empty content next to which the template renders tool calls."""
        if "empty" not in self._habits:
            ask = {"role": "user", "content": self.content("x")}
            self._habits["empty"] = [
                empty
                for empty in (self.content(""), None)
                if self._shows([ask, {"role": "assistant", "content": empty, "tool_calls": [_CALL]}])
            ]
        if not self._habits["empty"]:
            raise UnsupportedError(
                "This model's chat template does not render tool calls.", "Write the calls and their results as text."
            )
        return self._habits["empty"][0]

    def check_tools(
        self, messages: Sequence[Mapping[str, Any]], token_ids: list[int], *, continue_final_message: bool
    ) -> None:
        """Refuse tools that make no difference to the prompt."""
        if self._habits.get("tools"):
            return
        without = self._tokenizer.chat(
            messages, template_kwargs=self._template_kwargs, continue_final_message=continue_final_message
        )
        if without == token_ids:
            raise UnsupportedError(
                "`tools` were given, and this model's chat template leaves them out.",
                "Describe the tools in a system message, or use a model that knows tools.",
            )
        self._habits["tools"] = True

    def _shows(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the needle is in the prompt. A template that exceeds its limits is an error at once."""
        try:
            token_ids = self._tokenizer.chat(messages, tools=self._tools, template_kwargs=self._template_kwargs)
        except PolydraftError as error:
            if isinstance(error.__cause__, OverLimitsError):
                raise
            return False
        return _NEEDLE.encode() in b"".join(map(self._tokenizer.token_bytes, token_ids))
