"""Chat templates with the options, filters and globals of Transformers (``utils/chat_template_utils.py``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from polydraft.errors import InvalidRequestError, ModelFormatError

__all__ = ["ChatTemplate"]

_MARK = "\U000f0000"


class ChatTemplate:
    """A compiled template. ``tokens`` are the texts of special tokens as templates name them: ``bos_token``.

    Raises:
        ModelFormatError: The template is not valid Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFormatError(
                f"The model's chat template is not valid: {error}", "Give the prompt as text, or another GGUF file."
            ) from error
        self._tokens = dict(tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        arguments: Mapping[str, Any] | None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt, ending with the start of the answer, or with the last message's text.

        Raises:
            InvalidRequestError: The template refuses the messages.
        """
        rendered = [dict(message) for message in messages]
        if continue_final_message:
            rendered[-1]["content"] = f"{rendered[-1].get('content') or ''}{_MARK}"
        values = {
            **self._tokens,
            "messages": rendered,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": not continue_final_message,
            **(arguments or {}),
        }
        try:
            text = self._template.render(values)
            return text[: text.rindex(_MARK)] if continue_final_message else text
        except Exception as error:  # jinja2's errors, and whatever a template's expressions raise
            raise InvalidRequestError(
                f"The model's chat template refuses the messages: {error}", "Check the roles and their order."
            ) from error


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
