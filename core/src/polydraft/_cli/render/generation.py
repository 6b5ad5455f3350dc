"""A finished generation: the small table, and the JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from polydraft._flags import in_flags

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from polydraft._cli.comparison import Comparison
    from polydraft.contract import GenerationResult, GenerationStats, RunningInfo

__all__ = ["describe_running", "generation_json", "one_line", "summary", "without_text"]

_UNKNOWN = "not reported"
_TOY = (
    "The built-in models are toys, and their speeds say nothing about a real model's. docs/benchmarks.md has some of "
    "those; `polydraft tune --model MODEL` measures yours."
)


def generation_json(result: GenerationResult, comparison: Comparison | None = None) -> str:
    """The object of ``polydraft generate --json``, on one line, in ASCII."""
    running = result.running
    data: dict[str, Any] = {
        "backend": running.backend,
        "target": running.target,
        "drafter": running.drafter,
        **result.model_dump(mode="json"),
        "stats": result.stats.with_rates(),
    }
    if comparison is not None:
        plain, judgement = comparison.plain, comparison.judgement
        verdict = judgement.verdict if judgement else None
        data["compare"] = {
            "verdict": verdict,
            "identical": verdict == "EXACT",
            "passes": comparison.passes,
            "judgement": judgement.model_dump(mode="json") if judgement else None,
            "hint": comparison.hint,
            "speed_up": comparison.speed_up,
            "runs": comparison.runs,
            "tokens_per_second": {
                "speculative": comparison.speculative_tokens_per_second,
                "plain": comparison.plain_tokens_per_second,
            },
            "plain": {
                "token_ids": plain.token_ids,
                "text": plain.text,
                "finish_reason": plain.finish_reason,
                "stats": plain.stats.with_rates(),
            },
        }
    return json.dumps(data, allow_nan=False)


def summary(result: GenerationResult, comparison: Comparison | None = None) -> RenderableType:
    """What ran, what speculation did, and plain decoding for comparison."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = [Text(line, style="dim") for line in describe_running(result.running)]
    if result.speculation_off is not None:
        lines.append(Text(f"Speculation was off: {in_flags(result.speculation_off.message)}", style="yellow"))
    lines.append(_table(result, comparison))
    if comparison is not None:
        lines.append(_verdict(comparison))
        if result.running.target.startswith("builtin:"):
            lines.append(Text(_TOY, style="dim"))
    return Group(*lines)


def without_text(result: GenerationResult, *, thinking_shown: bool) -> str:
    """What an answer holds that has no text, one sentence; empty if it has text.

    ``thinking_shown`` says whether the thinking was shown as it was generated.
    """
    if result.text.strip():
        return ""
    thought = "thought" if thinking_shown else "thought (not shown)"
    if result.tool_calls:
        names = ", ".join(call.name for call in result.tool_calls)
        what = f"{thought} and tool calls" if result.thinking else "tool calls"
        return f"The answer has no text, only {what} (not shown): {names}."
    if not result.thinking:
        return "The answer has no text."
    more = "; a larger `max_new_tokens` leaves room for the answer" if result.finish_reason == "length" else ""
    return in_flags(f"The answer has no text, only {thought}{more}.")


def one_line(result: GenerationResult) -> str:
    """The numbers shown after each answer of a chat."""
    stats = result.stats
    parts = [f"{stats.num_tokens} tokens"]
    if stats.num_reused_tokens:
        parts.append(f"{stats.num_reused_tokens} of {stats.num_prompt_tokens} prompt tokens reused")
    if stats.mean_acceptance_length is not None:
        parts.append(f"{stats.mean_acceptance_length:.2f} per round")
    if stats.tokens_per_second is not None:
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    if result.finish_reason not in {"eos", "stop"}:
        parts.append(f"ended by {result.finish_reason}")
    if result.speculation_off is not None:
        parts.append(f"without speculation: {in_flags(result.speculation_off.message)}")
    return ", ".join(parts)


def describe_running(running: RunningInfo) -> list[str]:
    """What really runs, in one line, then the session's notes."""
    return [running.line, *map(in_flags, running.notes)]


def _table(result: GenerationResult, comparison: Comparison | None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_header=comparison is not None, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("speculative", justify="right")
    columns = [_cells(result.stats)]
    if comparison is not None:
        table.add_column("plain", justify="right")
        columns.append(_cells(comparison.plain.stats, plain=True))
        if comparison.runs > 1:
            speeds = comparison.speculative_tokens_per_second, comparison.plain_tokens_per_second
            for cells, speed in zip(columns, speeds, strict=True):
                del cells["tokens/s"]
                cells[f"tokens/s, median of {comparison.runs}"] = _UNKNOWN if speed is None else f"{speed:.1f}"
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))
    return table


def _cells(stats: GenerationStats, *, plain: bool = False) -> dict[str, str]:
    """The rows. Where nothing was drafted there is no rate: a dash, not an unreported number."""
    none = "-" if plain or stats.num_draft_tokens == 0 else _UNKNOWN
    drafted = "" if stats.num_draft_tokens is None else f" of {stats.num_draft_tokens}"
    return {
        "tokens": str(stats.num_tokens),
        "rounds": none if stats.num_drafts is None or plain else str(stats.num_drafts),
        "accepted drafts": none
        if stats.num_accepted_tokens is None or plain
        else f"{stats.num_accepted_tokens}{drafted}",
        "acceptance rate": none if stats.acceptance_rate is None else f"{stats.acceptance_rate:.1%}",
        "mean acceptance length": none
        if stats.mean_acceptance_length is None
        else f"{stats.mean_acceptance_length:.2f}",
        "tokens/s": _speed(stats),
    }


def _speed(stats: GenerationStats) -> str:
    if stats.tokens_per_second is not None:
        return f"{stats.tokens_per_second:.1f}"
    return "-" if stats.num_tokens < 2 else _UNKNOWN


def _verdict(comparison: Comparison) -> RenderableType:
    """The verdict and the speed; below it, of a difference, the evidence and what to do."""
    from rich.console import Group
    from rich.text import Text

    judgement = comparison.judgement
    if judgement is None:
        said, style = "identical: no   not judged", "yellow"
    elif judgement.verdict == "EXACT":
        said, style = "identical: yes   EXACT", "green"
    elif judgement.verdict == "NEAR_TIE":
        said, style = "identical: up to a near tie   NEAR_TIE", "yellow"
    else:
        said, style = "identical: NO   DIVERGED", "bold red"
    text = Text(said, style=style)
    if comparison.speed_up is not None:
        slower = " (slower than plain decoding)" if comparison.speed_up < 1 else ""
        text.append(f"   speed: {comparison.speed_up:.2f} x plain{slower}", style="default")
    lines = [text]
    if judgement is not None and judgement.position is not None:
        lines.append(
            Text(f"The outputs differ first at {judgement.unit} {judgement.position}. {in_flags(judgement.reason)}")
        )
    if comparison.hint:
        lines.append(Text(comparison.hint))
    return Group(*lines)
