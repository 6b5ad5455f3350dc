"""Records of a tuning, as returned, kept and printed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from polydraft._measuring.bench import MeasuredWeights
from polydraft.contract.records import DrafterKind, Exactness, Record
from polydraft.verification._verdict import Verdict

__all__ = ["FORMAT", "Asked", "RowState", "TunedRow", "TuningResult"]

FORMAT = 1
"""Version of the kept files; files of other versions are not read."""

RowState = Literal["measured", "dropped", "refused", "failed", "slow"]
"""``measured``: to the end. ``dropped``: after some rounds, being surely slower. ``refused``: it cannot load this, and
says why. ``failed``: an error or the end of its process. ``slow``: it did not load or answer in time."""


class Asked(Record):
    """The arguments of ``load`` that a tuning holds for, as they were given."""

    dtype: str
    device: str
    exactness: Exactness
    context_length: int | None
    quantization: str
    trust_remote_code: bool
    engine_options: dict[str, Any] = Field(description="Those that were set, without secrets.")


class TunedRow(Record):
    """One backend, drafter and k: what was measured, or why not."""

    backend: str
    drafter: str | None = Field(default=None, description="None: plain decoding, or drafts without a model.")
    method: DrafterKind | None = Field(default=None, description="None: plain decoding.")
    num_speculative_tokens: int = Field(default=0, description="k, the bonus token excluded; 0: plain decoding.")
    packing: str = Field(default="", description="Quantization of the weights, as engines write it.")
    quantized: bool = Field(
        default=False,
        description="Whether they are quantized though nobody asked for that: only then chosen if all are.",
    )
    state: RowState
    reason: str = Field(default="", description="Why it was dropped, refused or failed, sentences.")
    tokens_per_second: float | None = Field(
        default=None,
        description="Tokens of the outputs over the time that ``Session.generate`` takes, prompts included: of each "
        "prompt the median over the rounds. Where the engine computes in its process on the processor, the time in "
        "which other programs had it does not count.",
    )
    spread: tuple[float, float] | None = Field(
        default=None, description="The same of the slowest and of the fastest round."
    )
    by_class: dict[str, float] = Field(default_factory=dict, description="Class of prompts -> tokens/s.")
    first_token_seconds: float | None = Field(default=None, description="Time to the first token, median.")
    acceptance_rate: float | None = Field(default=None, description="Accepted / drafted; None: not reported.")
    acceptance_rate_per_position: tuple[float, ...] | None = None
    rounds: int = Field(default=0, description="How often it was measured.")
    load_seconds: float | None = Field(default=None, description="Of its engine, downloads included.")
    peak_memory_bytes: int | None = Field(
        default=None,
        description="Peak of resident memory of the process that ran it, with its own children; None: a server that "
        "runs apart.",
    )
    device_memory_bytes: int | None = Field(default=None, description="Peak on the device, where the engine tells.")
    verdict: Verdict | None = Field(
        default=None, description="Of ``polydraft verify``, for exactly this; None: not known, or plain decoding."
    )
    same_as_plain: bool | None = Field(
        default=None, description="Whether all outputs were those of this engine's plain decoding; None: not compared."
    )
    dtype: str = ""
    device: str = ""
    versions: dict[str, str] = Field(
        default_factory=dict, description="Distribution -> version and build; the measurement holds for these."
    )
    hardware: str = Field(default="", description="The processor, and the devices that the backend saw.")
    target_weights: MeasuredWeights | None = None
    drafter_weights: MeasuredWeights | None = None

    @property
    def label(self) -> str:
        """Such as ``transformers mtp k=4``, ``mlx plain``."""
        how = f"{self.method} k={self.num_speculative_tokens}" if self.method else "plain"
        return f"{self.backend} {how}"


class TuningResult(Record):
    """Everything that one run of ``polydraft.tune`` measured; the fastest rows come first."""

    format: int = FORMAT
    target: str = Field(description="Hub id, ``builtin:<name>``, or the absolute path.")
    revision: str | None = None
    asked: Asked
    processor: str
    created: str = Field(description="When, in UTC (ISO 8601).")
    seconds: float = Field(description="Time spent measuring, starts of engines not counted.")
    prompts: dict[str, int] = Field(description="Class -> number of prompts.")
    max_new_tokens: int = Field(description="Of each output; the longest that the time allowed, unless it was given.")
    rows: tuple[TunedRow, ...]
    chosen: int | None = Field(default=None, description="Index of the chosen row; None: nothing could be measured.")
    confidence: float | None = Field(
        default=None,
        description="Share of resamplings of the rounds in which the chosen row is within 5% of the fastest; None: "
        "there were too few rounds.",
    )
    interrupted: bool = False
    kept: bool = Field(default=False, description="Whether ``load`` will read it.")
    notes: tuple[str, ...] = ()

    @property
    def choice(self) -> TunedRow | None:
        """The chosen row."""
        return None if self.chosen is None else self.rows[self.chosen]

    def fastest(self, backend: str, *, plain: bool) -> TunedRow | None:
        """The fastest row of a backend, of plain decoding or of speculation, if any was measured and can be used."""
        found = (
            row
            for row in self.rows
            if row.backend == backend
            and (row.method is None) == plain
            and row.tokens_per_second
            and row.state in {"measured", "dropped"}
        )
        return next(found, None)
