"""A finished verification: one line per case, the summary, and the JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from polydraft._flags import in_flags
from polydraft.verification import VERDICTS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from polydraft.verification._records import CheckedCase, Verification

__all__ = ["case_line", "verification_json", "verification_summary"]

_NOT_REPORTED = "not reported"


def case_line(case: CheckedCase) -> str:
    """``EXACT      64 tokens after 48 of code, temperature=0.8 seed=1``."""
    how = " ".join(f"{name}={value}" for name, value in case.sampling.items()) or "greedy"
    place = f"after {case.num_prompt_tokens} of {case.prompt}"
    line = f"{case.judgement.verdict:<9} {case.num_tokens:>3} {case.judgement.unit}s {place}, {how}"
    if case.judgement.position is not None:
        line += f": output {case.judgement.unit} {case.judgement.position} differs"
    return line


def verification_json(found: Verification) -> str:
    """The object of ``polydraft verify --json``, on one line, in ASCII."""
    data: dict[str, Any] = {
        "verdict": found.verdict,
        "identical": found.verdict == "EXACT",
        "passes": found.passes,
        "num_tokens": found.num_tokens,
        "counts": {verdict: found.count(verdict) for verdict in VERDICTS},
        "speed_up": found.speed_up,
        **found.model_dump(mode="json"),
        "stats": found.stats.with_rates(),
    }
    return json.dumps(data, allow_nan=False)


def verification_summary(found: Verification) -> RenderableType:
    """The verdict, each difference with its evidence, acceptance and speed."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = [_verdict(found)]
    for case in found.cases:
        if case.judgement.verdict != "EXACT":
            lines += [
                Text(case_line(case)),
                Text(f"  {in_flags(case.judgement.reason)} {_tie(case)}".rstrip(), style="dim"),
            ]
    stats = found.stats
    rate = _NOT_REPORTED
    if stats.acceptance_rate is not None:
        rate = f"{stats.acceptance_rate:.1%} of {stats.num_draft_tokens} drafted tokens"
    length = _NOT_REPORTED if stats.mean_acceptance_length is None else f"{stats.mean_acceptance_length:.2f} tokens"
    lines.append(Text(f"acceptance: {rate}; mean acceptance length: {length}"))
    lines.append(Text(_speed(found)))
    lines += [Text(in_flags(note), style="dim") for note in found.notes]
    return Group(*lines)


def _verdict(found: Verification) -> RenderableType:
    from rich.text import Text

    unit = found.cases[0].judgement.unit
    what = f"{found.num_tokens} {unit}s of {len(found.cases)} outputs compared in {found.seconds:.0f} s"
    count = found.count("NEAR_TIE")
    ties = f"{count} near tie{'' if count == 1 else 's'}"
    if found.verdict == "EXACT":
        return Text(f"identical: yes   EXACT, {what}", style="green")
    if found.verdict == "NEAR_TIE":
        return Text(f"identical: up to {ties}   NEAR_TIE, {what}", style="yellow")
    defects = found.count("DIVERGED")
    return Text(
        f"identical: NO   DIVERGED in {defects} output{'' if defects == 1 else 's'} ({ties}), {what}", style="bold red"
    )


def _tie(case: CheckedCase) -> str:
    tie, tokens = case.judgement.tie, case.judgement.tokens
    if tie is None or tokens is None:
        return ""
    values = ", ".join("unknown" if value is None else f"{value:.4f}" for value in tie.values)
    return f"[tokens {tokens[0]} and {tokens[1]}, {tie.source} {values}; control {list(tie.control)}]"


def _speed(found: Verification) -> str:
    if found.speed_up is None:
        return f"speed: {_NOT_REPORTED}"
    slower = " (slower than plain decoding)" if found.speed_up < 1 else ""
    return (
        f"speed: {found.speed_up:.2f} x plain{slower}, {found.speculative_tokens_per_second:.1f} against "
        f"{found.plain_tokens_per_second:.1f} tokens/s"
    )
