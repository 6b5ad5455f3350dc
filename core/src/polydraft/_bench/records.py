"""Records of a benchmark, as returned and printed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from polydraft._measuring.identity import hardware_in_words
from polydraft._shown import html_table
from polydraft.contract.records import DrafterKind, Record

__all__ = ["BenchResult", "BenchRow", "RoundTimes"]

Spread = tuple[float, float]


class RoundTimes(Record):
    """Milliseconds of a round (of plain decoding: of a step), the median over the repeats; the prefill does not count.

    The parts are their shares in rounds that were split afterwards, since that slows them down. They are None where an
    engine keeps its own loop. ``host`` alone is known where an engine runs rounds in one piece, as on a GPU.
    """

    total: float
    draft: float | None = Field(default=None, description="The drafter's work.")
    verify: float | None = Field(default=None, description="The target's forward.")
    choose: float | None = Field(default=None, description="Choosing tokens from logits, drafts included.")
    host: float | None = Field(
        default=None, description="All the rest: acceptance, rollback, n-gram lookup, stops, text, statistics."
    )


class BenchRow(Record):
    """One side of the comparison: what was measured, or why not."""

    backend: str
    upstream: str | None = Field(default=None, description="The engine's own loop, by name; None: polydraft's.")
    drafter: str | None = Field(default=None, description="None: plain decoding, or drafts without a model.")
    method: DrafterKind | None = Field(default=None, description="None: plain decoding.")
    num_speculative_tokens: int | Literal["auto"] = Field(
        default=0, description="k, the bonus token excluded; 0: plain decoding; ``auto``: picked for each round."
    )
    state: Literal["measured", "refused", "failed", "slow"]
    reason: str = Field(default="", description="Why it was not measured, or only in part.")
    tokens_per_second: float | None = Field(
        default=None,
        description="Tokens over the time of whole calls, prompts included: of each prompt the median over the "
        "repeats. Where all sides compute in their process, on the processor, the time in which other programs had it "
        "does not count.",
    )
    spread: Spread | None = Field(default=None, description="The same of the slowest and of the fastest repeat.")
    runs: tuple[float, ...] = Field(default=(), description="The same of each repeat, in their order.")
    decode_tokens_per_second: float | None = Field(
        default=None, description="Tokens after the first / seconds after the first token, median over the repeats."
    )
    times_plain: float | None = Field(
        default=None,
        description="Speed over that of plain decoding of the same backend: the median over the repeats, each of "
        "which ran both. Of the engine's own loop: over its own plain decoding.",
    )
    times_plain_spread: Spread | None = None
    times_upstream: float | None = Field(
        default=None, description="Speed over that of the engine's own loop with the same k, in the same way."
    )
    times_upstream_spread: Spread | None = None
    first_token_seconds: float | None = Field(default=None, description="Time to the first token, median.")
    first_token_spread: Spread | None = None
    round_ms: RoundTimes | None = None
    acceptance_rate: float | None = Field(default=None, description="Accepted / drafted; None: not reported.")
    mean_acceptance_length: float | None = Field(default=None, description="Tokens per round, bonus token included.")
    acceptance_rate_per_position: tuple[float, ...] | None = None
    by_class: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="Class of prompts -> ``tokens_per_second``, ``times_plain``, ``acceptance_rate`` as far as known.",
    )
    same_as_plain: bool | None = Field(
        default=None, description="Whether all outputs were those of plain decoding; None: not compared."
    )
    repeats: int = Field(default=0, description="How often it was measured.")
    load_seconds: float | None = Field(default=None, description="Of its engine, downloads included.")
    peak_memory_bytes: int | None = Field(
        default=None,
        description="Peak of resident memory of the process that ran it, with its children and with the other sides "
        "that share the engine; None: a server that runs apart.",
    )
    device_memory_bytes: int | None = Field(default=None, description="Peak on the device, where the engine tells.")
    dtype: str = ""
    device: str = ""
    packing: str = Field(default="", description="Quantization of the weights, as engines write it.")
    versions: dict[str, str] = Field(default_factory=dict, description="Distribution -> version and build.")
    hardware: str = Field(default="", description="The processor, and the devices that the backend saw.")

    @property
    def label(self) -> str:
        """Such as ``transformers mtp k=4``, ``mlx plain``, ``transformers upstream mtp k=4``."""
        how = f"{self.method} k={self.num_speculative_tokens}" if self.method else "plain"
        return f"{self.backend}{' upstream' if self.upstream else ''} {how}"


class BenchResult(Record):
    """Everything that one run of ``polydraft.bench`` measured; rows in the order in which they took turns."""

    target: str = Field(description="Hub id, ``builtin:<name>``, or the absolute path.")
    revision: str | None = None
    asked: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of ``load`` that the rows do not tell and are no defaults; engine options, no secrets.",
    )
    processor: str
    created: str = Field(description="When, in UTC (ISO 8601).")
    seconds: float = Field(description="Time of all calls, starts of engines not counted.")
    prompts: dict[str, int] = Field(description="Class -> number of prompts.")
    max_new_tokens: int
    ignore_eos: bool
    temperature: float
    repeats: int = Field(description="Repeats that were asked for, the warm-up not counted.")
    synthetic_acceptance: float | None = Field(
        default=None,
        description="Drafts were accepted with this chance, whatever the target chose: the speeds are those of a "
        "drafter that is as good, and the outputs are no text of the model. None: drafts were accepted by the rule.",
    )
    rows: tuple[BenchRow, ...]
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> BenchRow | None:
        """The fastest of polydraft's speculative rows."""
        found = [row for row in self.rows if row.method and not row.upstream and row.tokens_per_second]
        return max(found, key=lambda row: row.tokens_per_second or 0.0, default=None)

    @property
    def hardware(self) -> str:
        """The processor, and the devices that the engines ran on."""
        return hardware_in_words(self.processor, self.rows)

    @property
    def title(self) -> str:
        """What was measured, in one line; synthetic acceptance is always told."""
        synthetic = self.synthetic_acceptance
        how = "" if synthetic is None else f" · SYNTHETIC ACCEPTANCE {synthetic:g}"
        prompts = sum(self.prompts.values())
        return f"{self.target} · {self.max_new_tokens} tokens, {prompts} prompt{'' if prompts == 1 else 's'}{how}"

    def __repr__(self) -> str:
        best = self.best
        told = ""
        if best is not None:
            told = f"; fastest {best.label}: {best.tokens_per_second:.1f} tokens/s"
            told += "" if best.times_plain is None else f", {best.times_plain:.2f} times plain decoding"
        return f"<BenchResult {self.title}{told}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_table(self.table(), caption=self.title)

    def table(self) -> list[dict[str, str]]:
        """The figures that say most, as texts: a row for each side, column -> cell."""
        return [_cells(row) for row in self.rows]


def _cells(row: BenchRow) -> dict[str, str]:
    cells = {
        "": row.label,
        "tokens/s": _number(row.tokens_per_second, ".1f"),
        "slowest-fastest": _range(row.spread, ".1f") if row.repeats > 1 else "",
        "x plain": _number(row.times_plain, ".2f"),
        "x upstream": _number(row.times_upstream, ".2f"),
        "first token": _number(row.first_token_seconds, ".0f", 1e3, " ms"),
        "accepted": _number(row.acceptance_rate, ".0%"),
        "tokens/round": _number(row.mean_acceptance_length, ".2f"),
        "output": {None: "", True: "same", False: "differs"}[row.same_as_plain],
    }
    return cells if row.state == "measured" else {**cells, "output": row.state}


def _number(value: float | None, form: str, times: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{value * times:{form}}{unit}"


def _range(value: tuple[float, float] | None, form: str) -> str:
    return "" if value is None else f"{value[0]:{form}}-{value[1]:{form}}"
