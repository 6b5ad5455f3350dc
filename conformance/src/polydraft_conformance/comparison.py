"""Two outputs token by token: EXACT, NEAR_TIE or DIVERGED, and a message that says where, by how much, and why.

A verdict is true of one pair on one backend with its engine's version, dtype and hardware, never of a backend as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.verification import Judgement, Tie, Verdict, first_difference, judge, measure_tie, tie_from_logprobs
from polydraft.verification._verdict import MARGIN_LIMIT

from polydraft_conformance.counting import stepping_engine
from polydraft_conformance.noise import epsilon_of, noise_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft import Session
    from polydraft.contract import Tokenizer

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = ["VERDICTS", "Comparison", "Verdict", "compare", "expect_same", "first_difference"]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_NOISE_CEILING = 16
"""Noise on the prefix in question counts up to so many times what it is on another context: it grows with the length,
but a defect that moves logits must not be its own excuse."""
_AROUND = 8
"""Tokens shown on each side of a difference."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing two outputs."""

    verdict: Verdict
    position: int | None = None
    """Index of the first output token that differs."""
    message: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready: what differs, where, by how much, and what the control showed."""

    @property
    def passes(self) -> bool:
        """Whether the two are equal as far as the engine's own numerics allow."""
        return self.verdict != "DIVERGED"


def compare(
    suite: Suite,
    case: Case,
    session: Session,
    prompt_token_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    *,
    names: tuple[str, str] = ("plain", "speculative"),
    settings: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare the outputs of one prompt. The verdict is added to the check's row of the report.

    Args:
        suite: Keeps the engine's measured noise, and takes the verdict.
        case: What the session was loaded with.
        session: Gives texts of tokens, and logits or log-probabilities where its engine has them.
        prompt_token_ids: The prompt.
        expected: The output that counts.
        found: The output that must equal it.
        names: What the two are called in the message.
        settings: Those of both generations; default: greedy.
    """
    position = first_difference(expected, found)
    if position is None:
        comparison = Comparison("EXACT")
    else:
        comparison = _judge(suite, case, session, prompt_token_ids, expected, found, names, dict(settings or {}))
    suite.comparisons.append(comparison)
    return comparison


def expect_same(
    suite: Suite,
    case: Case,
    session: Session,
    prompt_token_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    *,
    wrong: str,
    names: tuple[str, str] = ("plain", "speculative"),
    settings: Mapping[str, Any] | None = None,
) -> bool:
    """``compare``, and fail the check unless they are equal or nearly tied.

    Args:
        suite: As for ``compare``, like those that follow.
        case: See there.
        session: See there.
        prompt_token_ids: See there.
        expected: See there.
        found: See there.
        wrong: What is wrong if they are not, one sentence.
        names: See there.
        settings: See there.

    Returns:
        True if all tokens are equal, False after a near tie: then what follows it says nothing.

    Raises:
        AssertionError: They diverge.
    """
    comparison = compare(suite, case, session, prompt_token_ids, expected, found, names=names, settings=settings)
    if not comparison.passes:
        raise AssertionError(f"{wrong} {comparison.message}")
    return comparison.verdict == "EXACT"


def _judge(
    suite: Suite,
    case: Case,
    session: Session,
    prompt: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    names: tuple[str, str],
    settings: Mapping[str, Any],
) -> Comparison:
    """The verdict on outputs that differ, with its evidence."""
    tokenizer = session.tokenizer
    measured, why_not = _measure(suite, case, session, prompt, expected, found, settings)
    judgement = _without_excuses(suite, case, session, judge(expected, found, measured))
    position = judgement.position
    assert position is not None
    assert judgement.tokens is not None
    absolute = len(prompt) + position
    context = [*prompt, *expected[:position]]
    lines = [
        f"The outputs differ at output token {position} (absolute position {absolute}) of {len(expected)}: "
        f"{judgement.verdict}. {judgement.reason} {why_not}".rstrip(),
        f"of: {_subject(suite, case, session)}",
        *(f"{name}: {_token(token, tokenizer)}" for name, token in zip(names, judgement.tokens, strict=True)),
        f"before: {_text(context[-_AROUND:], tokenizer)}",
        *(
            f"{name} goes on: {_text(output[position : position + _AROUND], tokenizer)}"
            for name, output in zip(names, (expected, found), strict=True)
        ),
        _guess(expected, found, position),
        *(_tie_in_words(judgement, judgement.tie, names) if judgement.tie else []),
    ]
    evidence = {
        **judgement.model_dump(mode="json"),
        "reason": f"{judgement.reason} {why_not}".rstrip(),
        "of": _subject(suite, case, session),
        "absolute_position": absolute,
        "names": list(names),
        "texts": [None if token is None else _text([token], tokenizer) for token in judgement.tokens],
        "margin_in_noise": judgement.margin_in_noise,
    }
    return Comparison(judgement.verdict, position, "\n".join(line for line in lines if line), evidence)


def _measure(
    suite: Suite,
    case: Case,
    session: Session,
    prompt: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    settings: Mapping[str, Any],
) -> tuple[Callable[[int], Tie | None] | None, str]:
    """What measures a near tie on this engine; or None, and why none can be claimed."""
    if session.running.exactness == "bitwise":
        return None, "exactness='bitwise' promises equal bits: near ties do not count."
    engine = stepping_engine(session)
    if engine is not None:
        request = _request(session, prompt, settings)
        k = min(case.k, engine.max_draft_tokens)
        dtype = session.running.dtype
        return lambda position: measure_tie(engine, request, expected, found, position, k, dtype=dtype), ""
    if suite.capabilities is None or "logprobs" not in suite.capabilities.sampling:
        return None, "The engine gives neither logits nor log-probabilities: a near tie cannot be claimed."
    if settings.get("temperature"):
        return None, "What this engine adds when it samples is its own: a near tie of a sample cannot be claimed."
    return lambda position: tie_from_logprobs(session, prompt, expected, found, position), ""


def _request(session: Session, prompt: Sequence[int], settings: Mapping[str, Any]) -> TokenRequest:
    """The plain generation with these settings, as the loop gets it."""
    effective = GenerationSettings(**{name: value for name, value in settings.items() if name != "speculate"})
    return TokenRequest(
        prompt_token_ids=tuple(prompt),
        settings=effective,
        seed=effective.seed or 0,
        speculate=False,
        num_speculative_tokens=0,
        eos_token_ids=frozenset() if effective.ignore_eos else session.tokenizer.eos_token_ids,
        max_total_tokens=session.running.context_length,
    )


def _without_excuses(suite: Suite, case: Case, session: Session, judgement: Judgement) -> Judgement:
    """A near tie whose noise is far above the engine's on another context is none."""
    engine = stepping_engine(session)
    tie = judgement.tie
    if judgement.verdict != "NEAR_TIE" or engine is None or tie is None or tie.noise is None:
        return judgement
    elsewhere = noise_of(suite, case, session, engine)
    ceiling = _NOISE_CEILING * max(elsewhere.most, epsilon_of(session.running.dtype) * elsewhere.largest_logit)
    if tie.noise <= ceiling:
        return judgement
    reason = (
        f"The numeric noise measured on this prefix, {tie.noise:.3g}, is far above the engine's elsewhere "
        f"({elsewhere.most:.3g}): logits of several rows are wrong here."
    )
    return judgement.model_copy(update={"verdict": "DIVERGED", "reason": reason})


def _subject(suite: Suite, case: Case, session: Session) -> str:
    """What a verdict is true of."""
    running = session.running
    drafter = f" + {running.drafter}" if running.drafter else ""
    return (
        f"{running.target}{drafter} ({case.kind}, k={running.num_speculative_tokens}) on {running.backend}, "
        f"{running.engine} {running.engine_version}, {running.dtype}, {running.device}, {suite.hardware}"
    )


def _tie_in_words(judgement: Judgement, tie: Tie, names: tuple[str, str]) -> list[str]:
    """What was measured, a line each."""
    values = ["unknown" if value is None else f"{value:.6f}" for value in tie.values]
    noise = "unknown" if tie.noise is None else f"{tie.noise:.3g}"
    margin = "unknown" if tie.margin is None else f"{tie.margin:.3g}"
    if judgement.margin_in_noise is not None:
        margin += f" = {judgement.margin_in_noise:.3g} times the noise (a near tie has at most {MARGIN_LIMIT:g})"
    assert judgement.tokens is not None
    turned = sum(token == judgement.tokens[1] for token in tie.control)
    return [
        f"{tie.source} in plain decoding: {names[0]} token {values[0]}, {names[1]} token {values[1]}; "
        f"margin {margin}; noise {noise}",
        f"control, the plain output in blocks of k+1 tokens without any drafter: {turned} of {len(tie.control)} "
        f"choose the {names[1]} token",
    ]


def _guess(expected: Sequence[int], found: Sequence[int], position: int) -> str:
    """What a difference looks like, where its form says so."""
    rest, other = list(expected[position:]), list(found[position:])
    shared = min(len(rest), len(other)) - 1
    if shared >= 2 and other[:shared] == rest[1 : 1 + shared]:
        return "It looks as if one token was left out."
    if shared >= 2 and rest[:shared] == other[1 : 1 + shared]:
        return "It looks as if one token was put in."
    return ""


def _token(token: int | None, tokenizer: Tokenizer) -> str:
    if token is None:
        return "ended"
    return f"token {token} {_text([token], tokenizer)}"


def _text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    return repr(b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8", "replace"))
