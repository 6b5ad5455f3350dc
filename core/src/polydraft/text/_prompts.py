"""Encode a prompt of any kind as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from polydraft._numbers import as_int, shown
from polydraft.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from polydraft.contract.requests import Prompt

__all__ = ["EncodedPrompt", "encode_prompt"]


class _Encoder(Protocol):
    """The part of a ``Tokenizer`` that is used here."""

    @property
    def bos_token_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def chat(self, messages: Any, *, tools: Any, template_kwargs: Any) -> list[int]: ...


_KINDS = "Give text, chat messages ({'role': ..., 'content': ...}) or token ids."
_TEMPLATE_ARGUMENTS = {
    *("conversation", "messages", "tools", "tokenize", "return_tensors"),
    *("add_generation_prompt", "continue_final_message"),
}
_DEEPEST = 100
"""Levels of nesting in messages, tools and template arguments; many more would overflow the template engine's stack."""
_MEDIA = frozenset({"image", "image_url", "audio", "input_audio", "video", "video_url"})


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids of a prompt, and whether it went through the chat template."""

    token_ids: tuple[int, ...]
    is_chat: bool


def encode_prompt(
    prompt: Prompt,
    tokenizer: _Encoder,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int,
) -> EncodedPrompt:
    """Token ids of a prompt.

    Text is taken raw, with BOS exactly once if the model has one (even if the tokenizer's own ``add_bos_token`` is
    false, as Gemma 4's is). Messages go through the model's chat template. Ids are used as they are.

    Args:
        prompt: Text, messages, or ids from 0 to ``vocab_size - 1``.
        tokenizer: The target's tokenizer.
        tools: Tool schemas; for messages only.
        chat_template_kwargs: Variables for the chat template; for messages only.
        vocab_size: Number of ids that the model takes.

    Raises:
        InvalidRequestError: The prompt is empty or of another type, or contains an invalid token id or invalid Unicode.
        UnsupportedError: It contains an image, audio or video, or the model has no chat template.
    """
    if isinstance(prompt, str):
        _refuse_chat_arguments(tools, chat_template_kwargs)
        return EncodedPrompt(_known(_encode_text(prompt, tokenizer), vocab_size), is_chat=False)
    # These are iterable, too, but neither messages nor token ids; a set has no order.
    if isinstance(prompt, (bytes, bytearray, Mapping, Set)) or not hasattr(prompt, "__iter__"):
        raise InvalidRequestError(f"The prompt is of type {type(prompt).__name__}.", _KINDS)
    try:
        items = list(prompt)  # arrays and tensors as well
    except TypeError:  # of no dimension: a number
        raise InvalidRequestError(f"The prompt is {shown(prompt)}, a single number.", _KINDS) from None
    if not items:
        raise InvalidRequestError("The prompt is empty.", _KINDS)
    if all(isinstance(item, Mapping) for item in items):
        messages = [_check_message(item) for item in items if isinstance(item, Mapping)]
        if not any(_says_something(message) for message in messages):
            raise InvalidRequestError("The prompt is empty: no message has any content.", "Give one of them some text.")
        _check_chat_arguments(tools, chat_template_kwargs)
        _check_unicode((messages, tools, chat_template_kwargs))
        token_ids = tokenizer.chat(messages, tools=tools, template_kwargs=chat_template_kwargs)
        return EncodedPrompt(_known(token_ids, vocab_size), is_chat=True)
    _refuse_chat_arguments(tools, chat_template_kwargs)
    return EncodedPrompt(tuple(_check_id(item, vocab_size) for item in items), is_chat=False)


def _encode_text(text: str, tokenizer: _Encoder) -> list[int]:
    if not text:
        raise InvalidRequestError("The prompt is empty.", _KINDS)
    _check_unicode(text)
    token_ids = tokenizer.encode(text)
    bos = tokenizer.bos_token_id
    # The text itself may start with the name of the BOS token.
    if bos is not None and token_ids[:1] != [bos]:
        token_ids = [bos, *token_ids]
    return token_ids


def _known(token_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Check the ids of encoded text: a tokenizer may know more tokens than the model."""
    if not token_ids:
        raise InvalidRequestError("The prompt is empty: its text has no tokens.", "Give other text, or token ids.")
    # A tokenizer gives no negative ids, so the largest one decides.
    _check_id(max(token_ids), vocab_size)
    return tuple(token_ids)


def _check_id(item: Any, vocab_size: int) -> int:
    token_id = as_int(item)
    if token_id is None:
        raise InvalidRequestError(f"The prompt holds {shown(item)}, which is neither a message nor a token id.", _KINDS)
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(
            f"The prompt holds {shown(token_id)}, which is not a token of this model.",
            f"Token ids go from 0 to {vocab_size - 1}.",
        )
    return token_id


def _check_message(message: Mapping[Any, Any]) -> Mapping[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError("A chat message has no role.", "Give it a role such as 'user'.")
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise InvalidRequestError(f"The {role} message has no content.", "Give it text as its content.")
    elif not isinstance(content, str):
        _check_parts(role, content)
    return message


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    return any(texts) or bool(message.get("tool_calls"))


def _check_unicode(value: Any, depth: int = 0) -> None:
    """Refuse lone surrogates, which UTF-8 cannot encode, anywhere in the texts of a prompt; and nesting without end."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The prompt holds {value[error.start]!r} at character {error.start} of a text: half of a surrogate "
                "pair, which is not a character.",
                "Decode the text again, for example with errors='replace'.",
            ) from None
    elif isinstance(value, (Mapping, list, tuple)):
        if depth > _DEEPEST:
            raise InvalidRequestError(
                f"The prompt, its tools or chat_template_kwargs are nested more than {_DEEPEST} levels deep.",
                "Give fewer levels; a value that contains itself has no end.",
            )
        for part in [*value.keys(), *value.values()] if isinstance(value, Mapping) else value:
            _check_unicode(part, depth + 1)


def _check_parts(role: str, content: Any) -> None:
    if not isinstance(content, (list, tuple)):
        raise InvalidRequestError(
            f"The content of the {role} message is of type {type(content).__name__}.", "Give text, or a list of parts."
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _MEDIA:
            raise UnsupportedError(
                f"The {role} message holds a part of type {kind}; only text is supported so far.",
                "Leave the part out, or describe it in words.",
            )
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"A part of the {role} message is not text.", "Parts look like {'type': 'text', 'text': '...'}."
            )


def _check_chat_arguments(tools: Any, template_kwargs: Any) -> None:
    if tools is not None and (
        not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise InvalidRequestError(
            "tools is not a list of tool schemas.", "Give a list of dicts with 'type' and 'function', as JSON schemas."
        )
    if template_kwargs is None:
        return
    if not isinstance(template_kwargs, Mapping) or not all(isinstance(name, str) for name in template_kwargs):
        raise InvalidRequestError(
            "chat_template_kwargs is not a dict of names and values.", "For example {'enable_thinking': True}."
        )
    taken = sorted(_TEMPLATE_ARGUMENTS & set(template_kwargs))
    if taken:
        raise InvalidRequestError(
            f"chat_template_kwargs holds {taken[0]!r}, which polydraft sets itself.", "Leave it out."
        )


def _refuse_chat_arguments(tools: Any, template_kwargs: Any) -> None:
    if tools or template_kwargs:
        name = "tools" if tools else "chat_template_kwargs"
        raise InvalidRequestError(
            f"{name} were given with a prompt that is not chat messages.", "Give messages, or leave them out."
        )
