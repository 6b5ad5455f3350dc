"""Encode a prompt of any kind as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft._numbers import as_int, shown
from polydraft.errors import InvalidRequestError
from polydraft.text._messages import check_continuable, normalised_messages, normalised_tools, plain_data
from polydraft.text._template_habits import Habits, PromptEncoder, render

if TYPE_CHECKING:
    from polydraft.contract.requests import Prompt

__all__ = ["EncodedPrompt", "encode_prompt"]


_KINDS = "Give text, chat messages ({'role': ..., 'content': ...}) or token ids."
_TEMPLATE_ARGUMENTS = {
    *("conversation", "messages", "tools", "tokenize", "return_tensors"),
    *("add_generation_prompt", "continue_final_message"),
}


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids of a prompt, whether it went through the chat template, and the normalised tools that it offers."""

    token_ids: tuple[int, ...]
    is_chat: bool
    tools: tuple[Mapping[str, Any], ...] = ()


def encode_prompt(
    prompt: Prompt,
    tokenizer: PromptEncoder,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    vocab_size: int,
    habits: Habits | None = None,
) -> EncodedPrompt:
    """Token ids of a prompt.

    Text is taken raw, with BOS exactly once if the model has one (even if the tokenizer's own ``add_bos_token`` is
    false, as Gemma 4's is). Messages go through the model's chat template. Ids are used as they are.

    Args:
        prompt: Text, messages, or ids from 0 to ``vocab_size - 1``.
        tokenizer: The target's tokenizer.
        tools: Tool schemas; for messages only.
        chat_template_kwargs: Variables for the chat template; for messages only.
        continue_final_message: End the prompt with the text of the last message, which is the assistant's; for messages
            only.
        vocab_size: Number of ids that the model takes.
        habits: What is known of this tokenizer's templates; what is found is added.

    Raises:
        InvalidRequestError: The prompt is empty or of another type, or contains an invalid token id or invalid Unicode.
        UnsupportedError: It contains an image, audio or video; or the model has no chat template, or one that leaves
            out tools or tool calls.
    """
    if not isinstance(continue_final_message, bool):
        raise InvalidRequestError(
            f"`continue_final_message` is of type {type(continue_final_message).__name__}.",
            "Give True or False.",
            argument="continue_final_message",
        )
    chat_arguments: dict[str, Any] = {
        "tools": tools,
        "chat_template_kwargs": chat_template_kwargs,
        "continue_final_message": continue_final_message,
    }
    if isinstance(prompt, str):
        _refuse(chat_arguments)
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
        chat_arguments["tools"] = normalised_tools(tools)
        token_ids = _encode_chat(items, tokenizer, {} if habits is None else habits, **chat_arguments)
        return EncodedPrompt(_known(token_ids, vocab_size), is_chat=True, tools=tuple(chat_arguments["tools"] or ()))
    if not isinstance(items[0], int):
        # An object of a client library is refused with the way to convert it.
        plain_data(next(item for item in items if not isinstance(item, Mapping)))
    _refuse(chat_arguments)
    return EncodedPrompt(tuple(_check_id(item, vocab_size) for item in items), is_chat=False)


def _encode_chat(
    given: Sequence[Any],
    tokenizer: PromptEncoder,
    habits: Habits,
    *,
    tools: list[dict[str, Any]] | None,
    chat_template_kwargs: Any,
    continue_final_message: bool,
) -> list[int]:
    messages = normalised_messages(given)
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        raise InvalidRequestError("The prompt is empty: no message has any content.", "Give one of them some text.")
    if continue_final_message:
        check_continuable(messages)
    _check_template_kwargs(chat_template_kwargs)
    variables = None if chat_template_kwargs is None else plain_data(chat_template_kwargs)
    return render(
        messages,
        tokenizer,
        tools=tools,
        template_kwargs=variables,
        continue_final_message=continue_final_message,
        habits=habits,
    )


def _encode_text(text: str, tokenizer: PromptEncoder) -> list[int]:
    if not text:
        raise InvalidRequestError("The prompt is empty.", _KINDS)
    plain_data(text)
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


def _check_template_kwargs(template_kwargs: Any) -> None:
    if template_kwargs is None:
        return
    if not isinstance(template_kwargs, Mapping) or not all(isinstance(name, str) for name in template_kwargs):
        raise InvalidRequestError(
            "chat_template_kwargs is not a dict of names and values.", "For example {'enable_thinking': True}."
        )
    taken = sorted(_TEMPLATE_ARGUMENTS & set(template_kwargs))
    if taken:
        raise InvalidRequestError(
            f"`chat_template_kwargs` holds {taken[0]!r}, which polydraft sets itself.",
            "Leave it out.",
            argument="chat_template_kwargs",
        )


def _refuse(chat_arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are for messages only."""
    for name, value in chat_arguments.items():
        if value:
            raise InvalidRequestError(
                f"`{name}` was given with a prompt that is not chat messages.", "Give messages, or leave it out."
            )
