"""``ChatPolydraft``: messages in, messages with draft statistics out."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field

from langchain_polydraft.sessions import session_of

if TYPE_CHECKING:
    from polydraft import Chunk, GenerationResult, Session

__all__ = ["ChatPolydraft"]

_SETTINGS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "stop", "speculate"),
)
_LOAD = ("backend", "drafter", "num_speculative_tokens", "dtype", "device")


class ChatPolydraft(BaseChatModel):
    """A chat model that ``polydraft.load`` loads on first use, and that is kept until the process ends.

    >>> from langchain_polydraft import ChatPolydraft
    >>> model = ChatPolydraft(model="google/gemma-4-E4B-it", max_tokens=256)  # doctest: +SKIP
    >>> model.invoke("Explain speculative decoding.").content  # doctest: +SKIP

    Models with the same load arguments share what is loaded. Settings that are None are polydraft's own defaults; each
    may be given for one call: ``model.invoke(..., temperature=0.7)``, as may every other keyword argument of
    ``Session.generate``. Errors are polydraft's (``polydraft.errors``).
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(default="", description="The target: a Hub id, a folder, a file, builtin:NAME.")
    backend: str = Field(default="auto", description="Name of a backend; auto: the fittest that is installed.")
    drafter: str | None = Field(default="auto", description="auto, ngram, a model; None: plain decoding.")
    num_speculative_tokens: int | Literal["auto"] | None = Field(
        default=None, description="k: tokens proposed in one round, the bonus token excluded."
    )
    dtype: str = "auto"
    device: str = "auto"
    load_kwargs: dict[str, Any] = Field(default_factory=dict, description="Further arguments of `polydraft.load`.")
    session: Any = Field(
        default=None, exclude=True, repr=False, description="A loaded `polydraft.Session` to use; its owner closes it."
    )
    max_tokens: int | None = Field(default=None, description="Maximum number of tokens to generate: 512.")
    temperature: float | None = Field(default=None, description="0, the default, is greedy.")
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    speculate: Literal["auto", "on", "off"] | None = None
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of `Session.generate`, such as `chat_template_kwargs`."
    )

    @property
    def _llm_type(self) -> str:
        return "polydraft"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model_name": self._name, **self.model_dump(include={*_LOAD, *_SETTINGS})}

    @property
    def _name(self) -> str:
        return self.model if self.session is None else str(self.session.running.target)

    def load(self) -> Session:
        """The session that runs the model; loaded now if it was not yet.

        Raises:
            PolydraftError: As ``polydraft.load``.
        """
        if self.session is not None:
            return self.session  # type: ignore[no-any-return]
        return session_of(self.model, {name: getattr(self, name) for name in _LOAD} | self.load_kwargs)

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        session = self.load()
        return self._result(session.generate(_to_chat(messages), **self._arguments(stop, kwargs)))

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        session = await asyncio.to_thread(self.load)
        return self._result(await session.agenerate(_to_chat(messages), **self._arguments(stop, kwargs)))

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        session = self.load()
        with session.stream(_to_chat(messages), **self._arguments(stop, kwargs)) as chunks:
            for chunk in chunks:
                piece = _piece(chunk)
                if run_manager is not None:
                    run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece
        assert chunks.result is not None
        yield self._last(chunks.result)

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        session = await asyncio.to_thread(self.load)
        async with session.astream(_to_chat(messages), **self._arguments(stop, kwargs)) as chunks:
            async for chunk in chunks:
                piece = _piece(chunk)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece
        assert chunks.result is not None
        yield self._last(chunks.result)

    def _arguments(self, stop: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of ``generate``: the model's, then those of the call."""
        own = {name: getattr(self, name) for name in _SETTINGS} | self.model_kwargs
        called = own | given | ({} if stop is None else {"stop": stop})
        called.setdefault("max_new_tokens", called.pop("max_tokens"))
        return {name: value for name, value in called.items() if value is not None}

    def _result(self, result: GenerationResult) -> ChatResult:
        message = AIMessage(
            content=result.text,
            tool_calls=[tool_call(name=call.name, args=call.arguments, id=_new_id()) for call in result.tool_calls],
            additional_kwargs={"reasoning_content": result.thinking} if result.thinking else {},
            response_metadata=self._metadata(result),
            usage_metadata=_usage(result),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, result: GenerationResult) -> ChatGenerationChunk:
        """The chunk after the text: the usage and what speculation did."""
        message = AIMessageChunk(
            content="",
            response_metadata=self._metadata(result),
            usage_metadata=_usage(result),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    def _metadata(self, result: GenerationResult) -> dict[str, Any]:
        return {
            "model_name": self._name,
            "model_provider": "polydraft",
            "finish_reason": result.finish_reason,
            "seed": result.settings.seed,
            "stats": result.stats.with_rates(),
            "running": result.running.line,
            "speculation_off": result.speculation_off.message if result.speculation_off else None,
        }

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model, told of tools that it may call.

        Args:
            tools: Functions, pydantic models, LangChain's tools, or OpenAI's schemas.
            tool_choice: ``auto``; ``none``; ``any``, ``required`` or True: one of them is called, and the call follows
                its schema; a tool's name: that one.
            kwargs: Further arguments of each call.
        """
        if isinstance(tool_choice, dict):
            tool_choice = str(tool_choice.get("function", tool_choice).get("name"))
        chosen: Any = {"any": "required", True: "required", False: None}.get(tool_choice, tool_choice)
        if chosen not in (None, "auto", "none", "required"):
            chosen = {"name": chosen}
        if chosen is not None:
            kwargs["tool_choice"] = chosen
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling"] = "json_schema",
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The model, whose answers match a schema: a pydantic model (parsed into it), a TypedDict, or a JSON schema.

        Args:
            schema: What the answer must match.
            include_raw: Return ``{"raw": message, "parsed": ..., "parsing_error": ...}``.
            method: ``json_schema``: every token is chosen among those that the schema allows. ``function_calling``: the
                same in the arguments of a forced tool call, for models that were trained on those.
            kwargs: As LangChain passes them on; ``strict`` is always True.
        """
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        kwargs.pop("strict", None)
        if kwargs:
            raise ValueError(f"Unknown arguments: {', '.join(kwargs)}.")
        described = convert_to_json_schema(schema)
        told = {"kwargs": {"method": "json_schema"}, "schema": described}
        bound = self.bind(guided={"json": described}, ls_structured_output_format=told)
        is_model = isinstance(schema, type) and issubclass(schema, BaseModel)
        parser: Any = PydanticOutputParser(pydantic_object=schema) if is_model else JsonOutputParser()
        if not include_raw:
            return bound | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _to_chat(messages: list[BaseMessage]) -> list[dict[str, Any]]:
    """Messages in OpenAI's shapes. Earlier thinking is left out, as chat templates expect."""
    chat: list[dict[str, Any]] = list(convert_to_openai_messages(messages))
    for message in chat:
        if message["role"] == "assistant" and isinstance(message["content"], list):
            parts = [part for part in message["content"] if part.get("type") not in {"reasoning", "thinking"}]
            message["content"] = parts
    return chat


def _piece(chunk: Chunk) -> ChatGenerationChunk:
    message = AIMessageChunk(
        content=chunk.text,
        additional_kwargs={"reasoning_content": chunk.thinking} if chunk.thinking else {},
        tool_call_chunks=[
            tool_call_chunk(
                name=call.name, args=json.dumps(call.arguments, ensure_ascii=False), id=_new_id(), index=None
            )
            for call in chunk.tool_calls
        ],
    )
    return ChatGenerationChunk(message=message)


def _usage(result: GenerationResult) -> UsageMetadata | None:
    """Tokens; None where the engine takes and gives text alone, and has not counted the prompt's."""
    read, written = result.stats.num_prompt_tokens, result.stats.num_tokens
    if read is None:
        return None
    usage = UsageMetadata(input_tokens=read, output_tokens=written, total_tokens=read + written)
    if result.stats.num_reused_tokens is not None:
        usage["input_token_details"] = {"cache_read": result.stats.num_reused_tokens}
    return usage


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"
