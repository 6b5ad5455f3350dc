"""Decode the same prompt plainly and judge the speculative output against it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from polydraft._cli.waiting import waiting_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polydraft._session.session import Session
    from polydraft.contract import Capabilities, GenerationResult, GenerationStats, Prompt, RunningInfo
    from polydraft.contract.requests import GenerationSettings
    from polydraft.verification import Judgement

__all__ = ["Comparison", "compare_with_plain", "warm_up"]

_WARM_UP_TOKENS = 64
_SIXTEEN_BITS = {"bfloat16", "float16"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A speculative result and the plain one."""

    plain: GenerationResult
    judgement: Judgement | None
    """None if the outputs differ but need not be equal; ``hint`` has the reason."""
    passes: bool
    """Whether the promise is kept."""
    hint: str
    """What a difference means and what to do, sentences; empty if the outputs are equal."""
    runs: int
    """How often both were decoded; speeds are medians."""
    speculative_tokens_per_second: float | None
    plain_tokens_per_second: float | None

    @property
    def speed_up(self) -> float | None:
        """Tokens/s of the speculative decoding over those of the plain one; None if one is unknown."""
        fast, slow = self.speculative_tokens_per_second, self.plain_tokens_per_second
        return fast / slow if fast and slow else None


def warm_up(session: Session, prompt: Prompt, settings: dict[str, Any]) -> None:
    """Short calls both ways, so that what an engine does once is in neither measurement."""
    from polydraft._measuring import warming

    # These may reach beyond those few tokens.
    few = {name: value for name, value in settings.items() if name not in {"min_new_tokens", "forced_token_ids"}}
    tokens = min(_WARM_UP_TOKENS, settings.get("max_new_tokens", _WARM_UP_TOKENS))
    with waiting_for("Warming up"):
        for way in ({}, {"speculate": "off"}):
            given = {**few, **way}
            warming.warm_up(partial(_stats_of, session, prompt, given), tokens)


def _stats_of(session: Session, prompt: Prompt, settings: dict[str, Any], tokens: int) -> GenerationStats:
    return session.generate(prompt, **{**settings, "max_new_tokens": tokens}).stats


def compare_with_plain(
    session: Session,
    prompt: Prompt,
    settings: dict[str, Any],
    speculative: tuple[GenerationResult, Sequence[int]],
    loaded: Mapping[str, Any],
    runs: int = 1,
) -> Comparison:
    """Decode the prompt once more without speculation, with the same seed, and judge the difference.

    ``speculative`` is a result, and how many tokens each of its rounds gave. ``loaded`` are the arguments of
    ``polydraft.load``, for the command that verifies. More ``runs`` decode both ways again, in turn, for the speeds.
    """
    from polydraft.contract.results import compared
    from polydraft.verification import first_difference, judge_outputs

    result, rounds = speculative
    capabilities = capabilities_of(session)
    seed = {"seed": result.settings.seed} if "seed" in capabilities.sampling else {}
    with waiting_for("Decoding plainly"):
        plain = session.generate(prompt, **{**settings, **seed}, speculate="off")
    fast, slow = [result.stats.tokens_per_second], [plain.stats.tokens_per_second]
    with waiting_for("Measuring the speeds") if runs > 1 else nullcontext() as waiting:
        for number in range(2, runs + 1):
            if waiting is not None:
                waiting.step(f"Run {number} of {runs}")
            fast.append(session.generate(prompt, **{**settings, **seed}).stats.tokens_per_second)
            slow.append(session.generate(prompt, **{**settings, **seed}, speculate="off").stats.tokens_per_second)
    speeds = runs, _median(fast), _median(slow)
    expected, found = compared(plain, result)
    differ = first_difference(expected, found) is not None
    # A difference that breaks no promise is not measured.
    if differ and (why := _may_differ(result.settings, capabilities)):
        return Comparison(plain, None, True, why, *speeds)
    with waiting_for("Measuring the difference") if differ else nullcontext():
        reused = max(of.stats.num_reused_tokens or 0 for of in (plain, result))
        prompt_ids = plain.prompt_token_ids
        judgement = judge_outputs(
            session, capabilities, prompt_ids, plain.settings, expected, found, reused=reused, rounds=rounds
        )
    hint = _hint(judgement, session.running, capabilities, loaded) if differ else ""
    return Comparison(plain, judgement, judgement.passes, hint, *speeds)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None


def capabilities_of(session: Session) -> Capabilities:
    """The capabilities of the session's backend."""
    from polydraft._plugins import default_host

    return default_host().backend(session.running.backend).capabilities()


def _may_differ(settings: GenerationSettings, capabilities: Capabilities) -> str:
    """Why these outputs need not be the same tokens; empty if they must."""
    from polydraft.verification._measure import repeats_seeds

    if settings.temperature == 0.0:
        return ""
    if settings.acceptance == "rejection":
        return "--acceptance rejection keeps the distribution of samples, not the tokens of a seed."
    if not repeats_seeds(capabilities):
        return "This backend does not claim that a seed gives the same sample without speculation. Compare greedily."
    return ""


def _hint(judgement: Judgement, running: RunningInfo, capabilities: Capabilities, loaded: Mapping[str, Any]) -> str:
    """What a difference means, what removes it where it is or may be a near tie, and how to check a defect."""
    from polydraft.verification._gate import command_of

    kept = judgement.passes
    hints = ["Rounding decided between two tokens that the model rates alike: not a defect."] if kept else []
    if kept or (judgement.tie is None and None not in (judgement.tokens or ())):
        if "bitwise" in capabilities.exactness and running.exactness != "bitwise":
            hints.append("--exactness bitwise removes near ties.")
        if running.dtype.rpartition(".")[2] in _SIXTEEN_BITS:
            hints.append("--dtype float32 makes near ties very rare.")
    if not kept:
        command = command_of({**loaded, "target": running.target, "backend": running.backend})
        hints.append(f"Run `{command}`; if that fails too, report it with its --json output.")
    return " ".join(hints)
