"""Outputs: chunks, results and statistics."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from polydraft._shown import cut, html_table, html_text
from polydraft.contract.packings import Packing
from polydraft.contract.records import DrafterKind, Exactness, Record
from polydraft.contract.requests import ChosenBy, GenerationSettings, LoadRequest, OffReason

__all__ = [
    "Chunk",
    "EndReason",
    "FinishReason",
    "GenerationResult",
    "GenerationStats",
    "MatmulPrecision",
    "Round",
    "RunningInfo",
    "Segment",
    "TokenLogprobs",
    "ToolCall",
    "Verified",
    "compared",
]

FinishReason = Literal["length", "eos", "stop", "context", "cancelled"]
"""``length``: ``max_new_tokens``. ``eos``: an end-of-sequence id. ``stop``: a stop string or stop id. ``context``: the
context is full. ``cancelled``: closed or cancelled by the caller."""

if TYPE_CHECKING:
    CertainIds = tuple[int, ...] | Any  # None is rare: as typeshed has it then, nobody is made to ask for it
else:
    CertainIds = tuple[int, ...] | None

EndReason = Literal["length", "eos", "context"]
"""Those by which an engine ends its output itself."""

MatmulPrecision = Literal["tf32", "bfloat16", "float16"]
"""What the factors of matrix products are rounded to; ``tf32``: NVIDIA's, of 10 bits after the point."""


class TokenLogprobs(Record):
    """Natural log-probabilities at one position, from the target's raw logits (before temperature and filters)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = Field(default=(), description="(token id, logprob), best first.")


class Round(Record):
    """The output of one round (or one output of a whole engine): the unit that all engines share.

    Accepted drafts come first, the bonus token last. What an engine does not report is None, never 0.
    """

    token_ids: tuple[int, ...]
    certain_ids: bool = Field(
        default=True, description="Whether ``token_ids`` are what the engine emitted, not a tokenizer's for its text."
    )
    num_draft_tokens: int | None = Field(description="Tokens drafted in this round; 0: there was no draft.")
    num_accepted_tokens: int | None = Field(description="How many of ``token_ids`` are accepted drafts.")
    draft_token_ids: tuple[int, ...] | None = Field(
        default=None, description="The drafts, rejected ones included: ``num_draft_tokens`` of them."
    )
    logprobs: tuple[TokenLogprobs, ...] | None = None
    seconds: float | None = Field(
        default=None,
        ge=0,
        description="Time since the previous round (the first: since the request), for engines that generate ahead "
        "of the consumer; None: the core measures how long the consumer waits.",
    )


class Segment(Record):
    """A piece of a chunk's text of one origin: accepted drafts, or the target's own tokens."""

    text: str
    is_draft: bool


class ToolCall(Record):
    """A tool call that the model wrote."""

    name: str
    arguments: dict[str, Any]
    raw: str = Field(description="The call as the model wrote it, without its delimiting tokens.")


class Chunk(Record):
    """The output of one round, as the user sees it.

    The ``text`` of all chunks, joined, is ``GenerationResult.text``. A chunk never splits a UTF-8 character, and
    text that may be part of a stop string is held back, so ``text`` may be empty or include text of earlier tokens.
    """

    token_ids: CertainIds = Field(
        description="None where an engine gives text, and which tokens it has is not certain, or not yet."
    )
    text: str
    num_accepted_tokens: int | None = Field(description="How many of the round's tokens were accepted drafts.")
    num_draft_tokens: int | None = None
    draft_token_ids: tuple[int, ...] | None = Field(
        default=None, description="The round's drafts: accepted ones, then rejected ones; None: not reported."
    )
    segments: tuple[Segment, ...] = Field(
        default=(), description="``text`` split by origin; joined, they are ``text``."
    )
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = Field(default=(), description="Calls completed in this chunk.")
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = Field(default=None, description="Set on the last chunk.")

    def __repr__(self) -> str:
        accepted = "" if self.num_accepted_tokens is None else f", {self.num_accepted_tokens} accepted drafts"
        thinking = f", thinking {cut(self.thinking)}" if self.thinking else ""
        end = f", ended by {self.finish_reason}" if self.finish_reason else ""
        tokens = "tokens not known" if self.token_ids is None else _counted(len(self.token_ids), "token")
        return f"<Chunk {cut(self.text)}: {tokens}{accepted}{thinking}{end}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_text(_pieces(self.text, self.segments))


class GenerationStats(Record):
    """Counts of what happened. What the engine does not report is None, never 0.

    Definitions are vLLM's (``vllm/v1/spec_decode/metrics.py``): a round is one draft and the target forward that
    verifies it. Accepted drafts that a stop cut off are not counted.

    Where k differs from round to round (``num_speculative_tokens="auto"``), a round with k = 0 is one of
    ``num_target_steps`` and not of ``num_drafts``, like a round for which the drafter had no draft. So all rates are
    those of the rounds that drafted; the rate of a position counts rounds whose k did not reach it as not accepted, and
    ``drafted_per_position`` says how many did reach it.
    """

    num_tokens: int = Field(ge=0, description="Tokens emitted.")
    num_target_steps: int | None = Field(
        default=None, ge=0, description="Target forwards after prefill, rounds included."
    )
    num_drafts: int | None = Field(default=None, ge=0, description="Rounds: target forwards that verified a draft.")
    num_draft_tokens: int | None = Field(default=None, ge=0)
    num_accepted_tokens: int | None = Field(default=None, ge=0)
    accepted_per_position: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="Element i: number of rounds whose draft token i (from 0) was accepted."
    )
    drafted_per_position: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="Element i: number of rounds that drafted a token i (from 0)."
    )
    num_prompt_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Tokens of the prompt, reused ones included. An engine that gives text alone counts them itself.",
    )
    num_reused_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Tokens of the prompt that were not run, as an earlier call had left their KV.",
    )
    prefill_seconds: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Time to the first token, without waiting for the session's other calls.",
    )
    decode_seconds: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="From the first token to the last."
    )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None if nothing was drafted or the engine does not report it."""
        if not self.num_draft_tokens or self.num_accepted_tokens is None:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens

    @property
    def mean_acceptance_length(self) -> float | None:
        """1 + accepted / rounds: tokens per round, the bonus token included; None as for ``acceptance_rate``."""
        if not self.num_drafts or self.num_accepted_tokens is None:
            return None
        return 1 + self.num_accepted_tokens / self.num_drafts

    @property
    def acceptance_rate_per_position(self) -> tuple[float, ...] | None:
        """Element i: rounds whose draft token i was accepted / rounds; None as for ``acceptance_rate``."""
        if not self.num_drafts or self.accepted_per_position is None:
            return None
        return tuple(count / self.num_drafts for count in self.accepted_per_position)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first / decode seconds, so prefill is excluded; None for fewer than 2 tokens."""
        if not self.decode_seconds or self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / self.decode_seconds

    @classmethod
    def total(cls, stats: Iterable[GenerationStats]) -> GenerationStats:
        """The sums over several generations; a count that one of them does not report is None.

        Times are None as well: generations may have overlapped.
        """
        sums: dict[str, Any] = {}
        every = list(stats)
        for name in cls.model_fields.keys() - {"prefill_seconds", "decode_seconds"}:
            values = [getattr(one, name) for one in every]
            if None not in values:
                by_position = name.endswith("_per_position")
                sums[name] = tuple(map(sum, zip_longest(*values, fillvalue=0))) if by_position else sum(values)
        return cls(**sums)

    def __repr__(self) -> str:
        return f"<GenerationStats {', '.join(f'{name} {value}' for name, value in self._told().items())}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_table({"": name, "value": value} for name, value in self._told().items())

    def _told(self) -> dict[str, str]:
        """The numbers that say most, of those that the engine reports."""
        told: dict[str, str] = {"tokens": str(self.num_tokens)}
        if self.num_drafts is not None:
            told["rounds"] = str(self.num_drafts)
        if self.num_accepted_tokens is not None and self.num_draft_tokens:
            told["accepted drafts"] = f"{self.num_accepted_tokens} of {self.num_draft_tokens}"
        if self.acceptance_rate is not None:
            told["acceptance rate"] = f"{self.acceptance_rate:.1%}"
        if self.mean_acceptance_length is not None:
            told["mean acceptance length"] = f"{self.mean_acceptance_length:.2f}"
        if self.tokens_per_second is not None:
            told["tokens/s"] = f"{self.tokens_per_second:.1f}"
        return told

    def with_rates(self) -> dict[str, Any]:
        """The counts with the derived rates, as JSON-ready data."""
        rates = (
            *("acceptance_rate", "mean_acceptance_length", "acceptance_rate_per_position"),
            *("tokens_per_second", "tokens_per_target_step"),
        )
        return {**self.model_dump(mode="json"), **{name: getattr(self, name) for name in rates}}

    @property
    def tokens_per_target_step(self) -> float | None:
        """Tokens after the first / target forwards after prefill; None for fewer than 2 tokens."""
        if not self.num_target_steps or self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / self.num_target_steps


class Verified(Record):
    """The result of ``polydraft verify`` for exactly these weights, builds, dtype, device, k and exactness."""

    verdict: Literal["EXACT", "NEAR_TIE", "DIVERGED"]
    created: str = Field(description="Time in UTC, ISO 8601.")
    num_tokens: int = Field(description="Number of compared tokens.")


class RunningInfo(Record):
    """What a session really runs."""

    backend: str
    engine: str
    engine_version: str
    target: str
    drafter: str | None
    method: DrafterKind | None = Field(description="Speculation method; None: plain decoding.")
    num_speculative_tokens: int = Field(
        description="Effective k, the bonus token excluded; 0: plain decoding. Where k varies, that "
        "of calls with ``acceptance='rejection'``, which need a fixed one."
    )
    max_speculative_tokens: int | None = Field(
        default=None,
        description="The largest k, where that of each round is picked, from 0 on (``num_speculative_tokens='auto'``); "
        "None: k is fixed.",
    )
    dtype: str
    matmul_precision: MatmulPrecision | None = Field(
        default=None, description="Precision of matrix products where it is below that of ``dtype``; None: that of it."
    )
    has_experts: bool = Field(
        default=False,
        description="Whether the target is a mixture of experts: rounding below float32 may send a token to others.",
    )
    device: str
    context_length: int
    exactness: Exactness = "standard"
    concurrency: Literal["serial", "concurrent"] = Field(
        description="``serial``: calls wait for one another. ``concurrent``: they make progress together."
    )
    chosen_by: ChosenBy = Field(default=ChosenBy(), description="Who chose backend, drafter and k.")
    speculation_off: OffReason | None = None
    packing: Packing | None = Field(
        default=None, description="Whose weights run, their quantization and size, and which others were rejected."
    )
    process: Literal["this process", "worker"] = Field(
        default="this process", description="Where the engine runs: ``worker``: in a process of its own."
    )
    process_reason: str = Field(default="", description="Why it runs there, one sentence.")
    process_id: int | None = Field(default=None, description="The worker's process id; None in this process.")
    notes: tuple[str, ...] = ()
    verified: Verified | None = Field(
        default=None, description="None: never verified, or ``load`` did not look (``verified=``)."
    )

    def __repr__(self) -> str:
        return f"<RunningInfo {self.line}>"

    __str__ = __repr__

    @property
    def line(self) -> str:
        """What runs, in one line."""
        engine = self.backend if self.engine == self.backend else f"{self.backend} ({self.engine})"
        how = "plain decoding"
        if self.method is not None:
            most = self.max_speculative_tokens
            k = f"k={self.num_speculative_tokens}" if most is None else f"k=auto (0 to {most})"
            how = f"drafter {self.drafter or self.method}, {k}"
            if self.drafter:
                how += f" ({self.method})"
        exactness = "" if self.exactness == "standard" else f" · {self.exactness}"
        runs = f"{self.computes} on {self.device}"
        return f"{engine} {self.engine_version} · {self.target} · {how} · {runs}{exactness}"

    @property
    def computes(self) -> str:
        """The dtype, with the precision of matrix products where it is lower: ``float32 (tf32 products)``."""
        return self.dtype if self.matmul_precision is None else f"{self.dtype} ({self.matmul_precision} products)"

    @property
    def precision(self) -> str:
        """What rounding follows: ``matmul_precision``, or the dtype."""
        return self.matmul_precision or self.dtype

    def _repr_html_(self) -> str:
        k = (
            self.num_speculative_tokens
            if self.max_speculative_tokens is None
            else f"0 to {self.max_speculative_tokens}"
        )
        rows = {
            "target": self.target,
            "drafter": self.drafter or self.method or "none",
            "k": str(k),
            "engine": f"{self.backend} ({self.engine} {self.engine_version})",
            "runs as": f"{self.computes} on {self.device}, in {self.process}",
            "context": _counted(self.context_length, "token"),
            "exactness": self.exactness,
        }
        return html_table({"": name, "value": value} for name, value in rows.items())

    @property
    def max_draft_tokens(self) -> int:
        """The most drafts of a round."""
        return self.max_speculative_tokens or self.num_speculative_tokens

    @classmethod
    def of(
        cls,
        request: LoadRequest,
        *,
        engine: str,
        engine_version: str,
        dtype: str,
        device: str,
        context_length: int,
        concurrency: Literal["serial", "concurrent"],
        matmul_precision: MatmulPrecision | None = None,
        notes: Iterable[str] = (),
    ) -> Self:
        """Describe an engine that loaded ``request`` as planned: pair, method, k and exactness are the request's.

        Args:
            request: The request that was loaded.
            engine: Name of the engine.
            engine_version: Its version.
            dtype: Dtype of the weights as loaded.
            device: Device of the weights.
            context_length: Maximum number of tokens, prompt and output together.
            concurrency: ``serial``: calls wait for one another. ``concurrent``: they make progress together.
            matmul_precision: Precision of matrix products where it is below the dtype's: a note tells the user.
            notes: Sentences for the user, added after the plan's own note; empty ones are dropped.
        """
        plan, packing = request.plan, request.packing
        rounds = ""
        if matmul_precision is not None:
            rounds = (
                f"{engine} rounds the factors of {dtype} matrix products to {matmul_precision} on {device}, so near "
                f"ties are more frequent than in {dtype}."
            )
        return cls(
            backend=request.backend,
            engine=engine,
            engine_version=engine_version,
            target=request.target.id,
            drafter=plan.drafter.id if plan.drafter else None,
            method=plan.kind,
            num_speculative_tokens=plan.num_speculative_tokens if plan.kind else 0,
            max_speculative_tokens=plan.max_speculative_tokens if plan.kind else None,
            dtype=dtype,
            matmul_precision=matmul_precision,
            device=device,
            context_length=context_length,
            exactness=request.exactness,
            concurrency=concurrency,
            chosen_by=request.chosen_by,
            speculation_off=plan.off,
            packing=packing,
            notes=tuple(note for note in (plan.note, rounds, *notes, packing.note if packing else "") if note),
        )


class GenerationResult(Record):
    """A finished generation."""

    text: str = Field(description="The answer, without special tokens, thinking and tool calls.")
    raw_text: str = Field(description="All emitted tokens as text, special tokens included.")
    token_ids: CertainIds = Field(
        description="Emitted tokens; the last is the EOS or stop token, or the one that completed a stop string. None "
        "where an engine gives text, and which tokens it has is not certain."
    )
    certain_ids: bool = Field(
        default=True,
        exclude=True,
        repr=False,
        description="False: ``token_ids`` are None, or with ``Session.spells_ids`` the tokenizer's for a text.",
    )
    prompt_token_ids: tuple[int, ...]
    segments: tuple[Segment, ...] = Field(
        default=(), description="``text`` split by origin; joined, they are ``text``. Neighbours differ in origin."
    )
    finish_reason: FinishReason
    stop_match: str | int | None = Field(default=None, description="The stop string or token id that ended the output.")
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    settings: GenerationSettings = Field(description="The effective settings, with the seed that was used.")
    stats: GenerationStats
    running: RunningInfo
    speculation_off: OffReason | None = Field(default=None, description="Why this call did not speculate.")

    def __repr__(self) -> str:
        off = f"; without speculation: {self.speculation_off.message}" if self.speculation_off else ""
        told = ", ".join(f"{name} {value}" for name, value in self.stats._told().items())
        return f"<GenerationResult {cut(self.text)}: ended by {self.finish_reason}; {told}{off}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        caption = self.running.line
        if self.speculation_off is not None:
            caption += f"; without speculation: {self.speculation_off.message}"
        told = {**self.stats._told(), "ended by": self.finish_reason}
        return html_text(_pieces(self.text, self.segments)) + html_table([told], caption=caption)

    @property
    def matches(self) -> bool | None:
        """Whether the output is known to match what ``guided`` asked for; None without ``guided``.

        True: it ended by itself (``finish_reason`` is ``eos``). False: ``max_new_tokens``, the context, a stop or the
        caller may have cut it.
        """
        return None if self.settings.guided is None else self.finish_reason == "eos"

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a chat message for the next prompt: its text and tool calls, without the thinking."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


def _pieces(text: str, segments: Iterable[Segment]) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it is an accepted draft; one piece where the origins are not known."""
    return [(one.text, one.is_draft) for one in segments] or [(text, False)]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def compared(plain: GenerationResult, found: GenerationResult) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What two outputs are compared by: their tokens; where those of one are not certain, the characters of both.

    Of outputs that were cancelled this is the part that both have; of characters, too, where a limit ended one of them,
    as limits are of tokens.
    """
    ends = {plain.finish_reason, found.finish_reason}
    if None in (plain.token_ids, found.token_ids) or not (plain.certain_ids and found.certain_ids):
        own, other = (tuple(map(ord, result.raw_text)) for result in (plain, found))
        cut = not ends.isdisjoint({"cancelled", "length", "context"})
    else:
        own, other = plain.token_ids, found.token_ids
        cut = "cancelled" in ends
    # Two finished outputs must also end at the same token.
    most = min(len(own), len(other)) if cut else None
    return own[:most], other[:most]
