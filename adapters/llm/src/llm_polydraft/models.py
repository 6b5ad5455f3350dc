"""The models, for threads and for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import llm
from llm.parts import StreamEvent

from llm_polydraft.messages import to_chat, to_tools
from llm_polydraft.options import AnyTargetOptions, PolydraftOptions
from llm_polydraft.sessions import session_of

if TYPE_CHECKING:
    from polydraft import Chunk, GenerationResult, Session

__all__ = ["AsyncPolydraftModel", "PolydraftModel"]

_LOAD = (
    *("backend", "drafter", "num_speculative_tokens", "quantization", "exactness", "context_length", "dtype", "device"),
    *("revision", "local_files_only", "engine_options"),
)
"""Options that are arguments of ``polydraft.load``; the others are those of ``generate``."""


class _Call(NamedTuple):
    target: str
    load: dict[str, Any]
    messages: list[dict[str, Any]]
    settings: dict[str, Any]


class _Shared:
    """What both models have.

    Args:
        target: The model to run; None: the one that the option ``target`` names.
    """

    can_stream = True
    supports_schema = True
    supports_tools = True

    def __init__(self, target: str | None = None) -> None:
        self.target = target
        self.model_id = "polydraft" if target is None else f"polydraft/{target}"
        self.Options = AnyTargetOptions if target is None else PolydraftOptions

    def _call(self, prompt: llm.Prompt) -> _Call:
        """What to load and to generate.

        Raises:
            ModelError: No target is named, or a tool's result is not text.
        """
        given = prompt.options.model_dump(exclude_none=True)
        target = given.pop("target", self.target)
        if target is None:
            raise llm.ModelError("No model is named. Give -o target with one, such as google/gemma-4-E4B-it.")
        load = {name: given.pop(name) for name in _LOAD if name in given}
        if load.get("drafter") == "none":
            load["drafter"] = None
        if "enable_thinking" in given:
            given["chat_template_kwargs"] = {"enable_thinking": given.pop("enable_thinking")}
        if prompt.tools:
            given["tools"] = to_tools(prompt.tools)
        if prompt.schema:
            given["guided"] = {"json": prompt.schema}
        return _Call(target, load, to_chat(prompt.messages), given)


def _events(chunk: Chunk) -> Iterator[StreamEvent]:
    if chunk.thinking:
        yield StreamEvent(type="reasoning", chunk=chunk.thinking)
    if chunk.text:
        yield StreamEvent(type="text", chunk=chunk.text)


def _finish(response: Any, session: Session, result: GenerationResult) -> None:
    """Tell ``llm`` what the answer cost, which tools it calls, and what speculation did.

    Raises:
        ModelError: A schema was asked for, and the output was cut before it matched.
    """
    stats = result.stats
    details = {
        name: value
        for name in ("num_draft_tokens", "num_accepted_tokens", "num_reused_tokens")
        if (value := getattr(stats, name)) is not None
    }
    response.set_usage(input=stats.num_prompt_tokens, output=stats.num_tokens, details=details)
    response.set_resolved_model(session.running.target)
    response.response_json = {
        "finish_reason": result.finish_reason,
        "running": session.running.line,
        "stats": stats.with_rates(),
        "speculation_off": result.speculation_off.message if result.speculation_off else None,
    }
    for call in result.tool_calls:
        response.add_tool_call(llm.ToolCall(name=call.name, arguments=call.arguments))
    if result.matches is False:
        raise llm.ModelError(
            f"The output was cut after {stats.num_tokens} tokens ({result.finish_reason}), before it matched the "
            "schema. Raise the option max_new_tokens."
        )


class PolydraftModel(_Shared, llm.Model):
    """A model of ``llm`` that polydraft runs, in this process. The first prompt loads it."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[StreamEvent]:
        """Generate the answer; one event or two per round.

        Raises:
            PolydraftError: As ``polydraft.load`` and ``Session.stream``.
            ModelError: No target is named, or what it takes or gives is not text, or does not match the schema.
        """
        call = self._call(prompt)
        session = session_of(call.target, call.load)
        with session.stream(call.messages, **call.settings) as chunks:
            for chunk in chunks:
                yield from _events(chunk)
        assert chunks.result is not None
        _finish(response, session, chunks.result)


class AsyncPolydraftModel(_Shared, llm.AsyncModel):
    """The same for an event loop. Both share what is loaded."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncIterator[StreamEvent]:
        """As ``PolydraftModel.execute``."""
        call = self._call(prompt)
        session = await asyncio.to_thread(session_of, call.target, call.load)
        async with session.astream(call.messages, **call.settings) as chunks:
            async for chunk in chunks:
                for event in _events(chunk):
                    yield event
        assert chunks.result is not None
        _finish(response, session, chunks.result)
