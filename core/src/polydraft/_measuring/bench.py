"""What the search asks of whatever measures: a bench. One has a process for each engine, another this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field

from polydraft._measuring.prompts import MeasuredPrompt
from polydraft.contract.records import DrafterKind, Record
from polydraft.contract.results import GenerationStats
from polydraft.verification._verdict import Verdict

__all__ = [
    "AnyK",
    "Bench",
    "CallSettings",
    "Group",
    "LoadedInfo",
    "MeasuredWeights",
    "NotMeasurable",
    "RoundSeconds",
    "Sample",
    "Way",
    "failure_of",
]


AnyK = int | Literal["auto"]
"""k, 0 for plain decoding, or ``auto``: picked for each round."""


class Way(Record):
    """A way in which a backend can decode the target: plainly, or with one drafter."""

    method: DrafterKind | None = None
    drafter: str | None = None
    argument: str | None = Field(default=None, description="``load``'s ``drafter``, as the rules choose: no tuning.")
    recommended: int = Field(default=0, description="k that the rules choose; 0: plain decoding.")
    most: int = Field(default=0, description="The backend's largest k.")
    any_k: bool = Field(
        default=False, description="Whether its engine probably decodes with every k up to that of the load."
    )
    one_k: bool = Field(default=False, description="Whether the target's file fixes k.")
    upstream: str = Field(default="", description="Name of the engine's own speculative decoding, if it has one.")


class CallSettings(Record):
    """How a call is made."""

    max_new_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int | None = None
    split: bool = Field(
        default=False, description="Whether to split the rounds of a stepping engine, which slows them down."
    )
    upstream: bool = Field(default=False, description="Whether the engine's own loop makes it; then it is greedy.")
    synthetic_acceptance: float | None = Field(
        default=None, description="Chance that a draft is accepted, whatever the target chooses."
    )


class RoundSeconds(Record):
    """Where the time of a call's rounds went, the prefill not counted. None: the parts are not known."""

    engine: float = Field(description="In the engine; the rest of the call's rounds is the loop's.")
    draft: float | None = None
    verify: float | None = None
    choose: float | None = Field(default=None, description="Choosing tokens from logits, drafts included.")

    def in_shares_of(self, other: RoundSeconds) -> RoundSeconds:
        """The same time in the engine, in the parts of other rounds."""
        shares = {
            name: self.engine * part / other.engine
            for name in ("draft", "verify", "choose")
            if (part := getattr(other, name)) is not None and other.engine
        }
        return RoundSeconds(engine=self.engine, **shares)


class Sample(Record):
    """One call of ``generate``."""

    seconds: float
    cpu_seconds: float | None = Field(
        default=None,
        description="Processor time that the call took, over all threads; None: it computes elsewhere as well.",
    )
    first_token_seconds: float | None
    num_tokens: int
    digest: str = Field(description="Of the output's token ids; empty where those are not certain.")
    cut: bool = Field(description="Whether it was ended by the time limit.")
    stats: GenerationStats
    parts: RoundSeconds | None = None


class MeasuredWeights(Record):
    """The files of a model that was measured."""

    id: str = Field(description="Hub id, ``builtin:<name>``, or the absolute path.")
    fingerprint: str = Field(description="Of all bytes; empty where they are not on this machine.")
    state: str = Field(description="Of names, inodes, sizes and times of the same files: read in no time.")


class LoadedInfo(Record):
    """What an engine says of itself once it is loaded."""

    any_k: bool = Field(description="Whether it decodes with every k up to that of the load, 0 included.")
    steps: bool = Field(default=False, description="Whether polydraft runs its loop, in the process that measures.")
    load_seconds: float
    dtype: str
    device: str
    packing: str = Field(default="", description="Quantization of the weights, as engines write it.")
    quantized: bool = Field(default=False, description="Whether they are quantized though nobody asked for that.")
    versions: dict[str, str]
    hardware: str
    target_weights: MeasuredWeights
    drafter_weights: MeasuredWeights | None = None
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """What is loaded at once: one backend with one drafter."""

    backend: str
    way: Way
    k: int
    """As loaded; engines that take any k decode with smaller ones as well."""
    picks_k: bool = False
    """Loaded with ``num_speculative_tokens="auto"``."""


class NotMeasurable(Exception):  # noqa: N818 - an outcome that becomes a row
    """Why something cannot be measured."""

    def __init__(self, state: Literal["refused", "failed", "slow"], reason: str) -> None:
        super().__init__(reason)
        self.state = state
        self.reason = reason


class Bench(Protocol):
    """Measures. What is loaded may be unloaded for want of memory: it is then loaded again when it is needed."""

    def ways(self, backend: str) -> tuple[Way, ...]:
        """How a backend decodes the target, plain decoding first. Nothing is loaded.

        Raises:
            NotMeasurable: It cannot.
        """

    def load(self, group: Group) -> LoadedInfo:
        """Load it.

        Raises:
            NotMeasurable: It cannot be loaded, or not in time.
        """

    def info(self, group: Group) -> LoadedInfo:
        """What was loaded, with the peaks of memory so far."""

    def measure(self, group: Group, k: AnyK, prompt: MeasuredPrompt, settings: CallSettings, limit: float) -> Sample:
        """One call of ``generate``; before the first with this k a few tokens are decoded and not counted.

        Args:
            group: What is loaded; if it no longer is, it is loaded again.
            k: 0: plain decoding.
            prompt: The prompt.
            settings: How the call is made.
            limit: Seconds after which the call is ended early.

        Raises:
            NotMeasurable: It failed.
        """

    def verdict(self, group: Group, k: int, seconds: float) -> Verdict | None:
        """The verdict of ``polydraft verify``: a kept one, else one found in about ``seconds``; None: not known.

        Args:
            group: What is loaded.
            k: At least 1.
            seconds: 0: only a kept one counts.
        """

    def together(self, groups: list[Group]) -> bool:
        """Whether all of these are loaded now, so that changing between them takes no time."""

    def unload(self, group: Group) -> None:
        """It is not needed any more."""

    def close(self) -> None:
        """Unload everything."""


def failure_of(error: Any) -> str:
    """An error in words: its sentence, or its class and text."""
    message = getattr(error, "message", "")
    return message or f"{type(error).__name__}: {error}".rstrip(": ") + "."
