"""How a model's prompts begin, end and are laid out: one rule for the tokenizers of all engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from polydraft.checkpoints.special_tokens import SpecialTokens, turn_ends
from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.text._templates import render

__all__ = ["FormattedTokenizer", "PromptFormat", "utf8"]

_DEFAULT, _WITH_TOOLS = "default", "tool_use"  # Transformers' names
_NAME = "chat_template"


class PromptFormat:
    """A checkpoint's special tokens and chat templates, with the ids of its vocabulary.

    Args:
        special: What the checkpoint says.
        token_id: The id of a token's text; None if there is none.
        encode: Ids of a text, without added tokens.
        adds_bos: Whether the tokenizer by itself begins a text with BOS.
    """

    def __init__(
        self,
        special: SpecialTokens,
        token_id: Callable[[str], int | None],
        encode: Callable[[str], list[int]],
        *,
        adds_bos: bool,
    ) -> None:
        self._special = special
        self._token_id = token_id
        self._encode = encode
        self._adds_bos = adds_bos

    @cached_property
    def _bos(self) -> int | None:
        name = self._special.names.get("bos_token")
        return None if name is None else self._token_id(name)

    @cached_property
    def bos_token_id(self) -> int | None:
        """The id that texts begin with; None if they begin with none.

        A checkpoint may name a BOS token that the model was not trained to see. It is used if the tokenizer adds it, or
        a chat template writes ``bos_token``: then it is part of what the model knows, whatever ``add_bos_token`` says.
        """
        special = self._special
        written = any("bos_token" in template for template in special.chat_templates.values())
        return self._bos if self._adds_bos or written or special.needs_bos else None

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """All ids that end an output: those that the checkpoint lists, its ``eos_token``, and known ends of a turn."""
        name = self._special.names.get("eos_token")
        own = None if name is None else self._token_id(name)
        found = self._special.eos_token_ids | turn_ends(self._token_id)
        return found if own is None else found | {own}

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any] | None,
        *,
        continue_final_message: bool,
    ) -> list[int]:
        """Token ids of the messages, as ``Tokenizer.chat`` describes them.

        ``chat_template`` in ``template_kwargs`` names one of the checkpoint's templates, or is one.
        """
        variables = dict(template_kwargs or {})
        source, own = self._choose(variables.pop(_NAME, None), bool(tools))
        values = {**self._special.names, "tools": list(tools) if tools else None, **variables}
        token_ids = self._encode(render(source, messages, values, open_end=continue_final_message, own=own))
        bos = self._bos
        # Most templates write BOS themselves. Where one does not, it is added; a second one is removed.
        if bos is not None and self._adds_bos and token_ids[:1] != [bos]:
            return [bos, *token_ids]
        while bos is not None and token_ids[:2] == [bos, bos]:
            token_ids = token_ids[1:]
        return token_ids

    def _choose(self, wanted: Any, with_tools: bool) -> tuple[str, bool]:
        """The template, and whether it is the checkpoint's."""
        templates = self._special.chat_templates
        if wanted is not None:
            if not isinstance(wanted, str):
                raise InvalidRequestError(
                    f"`chat_template` is of type {type(wanted).__name__}.", "Give a template's name, or its text."
                )
            return templates.get(wanted, wanted), wanted in templates
        for name in (_WITH_TOOLS, _DEFAULT) if with_tools else (_DEFAULT,):
            if name in templates:
                return templates[name], True
        if templates:
            raise InvalidRequestError(
                f"This model has several chat templates and no default: {', '.join(sorted(templates))}.",
                f"Name one: `chat_template_kwargs={{'chat_template': {min(templates)!r}}}`.",
            )
        raise UnsupportedError(
            "This model has no chat template.", "Give the prompt as text, or use an instruction-tuned model."
        )


class FormattedTokenizer(ABC):
    """The members of a ``polydraft.contract.Tokenizer`` that follow from its ``PromptFormat``."""

    @property
    @abstractmethod
    def _format(self) -> PromptFormat:
        """How prompts are laid out. Asked for often: keep it."""

    @property
    def bos_token_id(self) -> int | None:
        """The id that texts begin with: see ``PromptFormat``."""
        return self._format.bos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """All ids that end an output: see ``PromptFormat``."""
        return self._format.eos_token_ids

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of the messages through the checkpoint's chat template.

        Errors as for ``Tokenizer.chat``.
        """
        return self._format.chat(messages, tools, template_kwargs, continue_final_message=continue_final_message)


def utf8(text: str) -> bytes:
    """The bytes of a text.

    Raises:
        InvalidRequestError: It holds half of a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text holds a lone surrogate at character {error.start}.", "Give text that is valid Unicode."
        ) from error
