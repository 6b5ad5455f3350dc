"""Measuring on a whole engine, through the log-probabilities that it reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft.contract.requests import DEFAULT_SETTINGS
from polydraft.verification._noise import reroutes
from polydraft.verification._verdict import MARGIN_LIMIT, Tie

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft._session.session import Session
    from polydraft.contract.requests import GenerationSettings
    from polydraft.contract.results import GenerationResult, TokenLogprobs

__all__ = ["FORBIDDING", "tie_from_logprobs"]

FORBIDDING = ("min_new_tokens", "banned_token_ids", "guided")
"""Settings that only forbid tokens: of those that are left, the one of the largest log-probability is chosen."""

_BEST = 5
"""Tokens whose log-probabilities are asked for; engines limit the number."""
_SAMPLES = 8
"""At about this many positions before the difference the noise is measured, and at as many after it."""
_BACK = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tokens that are decoded up to the position, after a prefill of those before them."""

_Values = dict[int, float]
"""Token -> log-probability."""


def tie_from_logprobs(
    session: Session,
    prompt_token_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    position: int,
    *,
    settings: GenerationSettings | None = None,
) -> Tie | str:
    """Decode plainly again with log-probabilities, and score the same prefixes in one prefill each: the control.

    For greedy outputs only: what an engine adds when it samples is not known. Where that prefill does not choose the
    other token of a near tie, the control also decodes plainly after prefills of other lengths, and, in an engine that
    batches, in batches of equal prompts, as rounds are batches of rows. In a mixture of experts rounding may send this
    position's token to other experts: what these ways, all of single steps, differ by there is ``Tie.noise_alone``.

    With settings that forbid tokens, the prefills choose between the two tokens only, both of which may come, and
    values are compared relative to that of the token that was chosen, since tokens may be left out of some of the sums.

    Args:
        session: A session whose backend claims the setting ``logprobs``.
        prompt_token_ids: The prompt.
        expected: Plain output.
        found: The other output.
        position: Index of the first token that differs; both have one there.
        settings: Of both outputs; None: greedy ones that EOS does not end. Only ``ignore_eos`` (an engine may forbid
            EOS where it is True) and those in ``FORBIDDING`` are looked at.

    Returns:
        A sentence where plain decoding does not repeat itself up to the difference: then nothing can be measured.
    """
    prompt, running = list(prompt_token_ids), session.running
    common: dict[str, Any] = {
        "speculate": "off",
        "temperature": 0.0,
        "logprobs": _BEST,
        "ignore_eos": settings is None or settings.ignore_eos,
    }
    asked = settings or DEFAULT_SETTINGS
    forbidding = {
        name: value for name in FORBIDDING if (value := getattr(asked, name)) != getattr(DEFAULT_SETTINGS, name)
    }
    length = min(position + 1 + _SAMPLES, running.context_length - len(prompt))
    plain = session.generate(prompt, max_new_tokens=length, **common, **forbidding)
    if plain.token_ids[: position + 1] != tuple(expected[: position + 1]) or plain.logprobs is None:
        return "Plain decoding does not repeat itself up to the difference, so nothing can be measured."
    own, other = expected[position], found[position]

    def prefilled(index: int) -> TokenLogprobs:
        """Of the token at this index, after a prefill of all tokens before it."""
        result = session.generate([*prompt, *plain.token_ids[:index]], max_new_tokens=1, **common)
        assert result.logprobs is not None
        return result.logprobs[0]

    def gap(index: int, entry: TokenLogprobs) -> float | None:
        """The largest difference of the values at this index; None: no token is in both."""
        assert plain.logprobs is not None
        left, right = _by_token(plain.logprobs[index]), _by_token(entry)
        shift, scale, chosen = 0.0, 1.0, plain.token_ids[index]
        if forbidding:
            if chosen not in right:
                return None
            # The difference of two logits may be off by what both are.
            shift, scale = left[chosen] - right[chosen], 0.5
        shared = left.keys() & right.keys() - ({chosen} if forbidding else set())
        return max((scale * abs(left[token] - right[token] - shift) for token in shared), default=None)

    def choice(entry: TokenLogprobs) -> int:
        """What the engine chose, or would choose of the two."""
        if not forbidding:
            return entry.token_id
        values = _by_token(entry)
        return max((own, other), key=lambda token: (values.get(token, float("-inf")), -token))

    # From 1: token 0 comes from a prefill both times.
    indices = [*range(1, position, max(1, position // _SAMPLES)), *range(position + 1, len(plain.token_ids))]
    noise = [value for index in indices if (value := gap(index, prefilled(index))) is not None]
    here = _by_token(plain.logprobs[position])
    control = [choice(prefilled(position))]
    # A difference of log-probabilities is one of logits: the normaliser cancels.
    margin = here[own] - here[other] if other in here else None
    most, noise_alone = max(noise, default=0.0), None
    if margin is not None and abs(margin) > MARGIN_LIMIT * most:
        if running.has_experts and reroutes(running.precision):
            ways = [*_decoded(session, prompt, plain.token_ids, position, common, forbidding)]
            control += [entry.token_id for entry in ways]
            noise_alone = max((value for entry in ways if (value := gap(position, entry)) is not None), default=None)
    elif margin is not None and other not in control:
        for entry in _decoded(session, prompt, plain.token_ids, position, common, forbidding):
            control.append(entry.token_id)
            if entry.token_id == other:
                break
    return Tie(
        source="logprobs",
        values=(here[own], here.get(other)),
        margin=margin,
        noise=max(noise, default=None),
        noise_alone=noise_alone,
        control=tuple(control),
    )


def _decoded(
    session: Session,
    prompt: list[int],
    output: Sequence[int],
    position: int,
    common: dict[str, Any],
    forbidding: dict[str, Any],
) -> Iterator[TokenLogprobs]:
    """The token at this index of a plain output, decoded by steps of one token after the same ones, in other ways."""

    def entry(result: GenerationResult, start: int) -> Iterator[TokenLogprobs]:
        assert result.logprobs is not None
        index = position - start
        if len(result.token_ids) > index and result.token_ids[:index] == tuple(output[start:position]):
            yield result.logprobs[index]

    # A grammar cannot start in the middle of a text.
    for start in () if forbidding else [position - back for back in _BACK if 0 < back < position]:
        result = session.generate([*prompt, *output[:start]], max_new_tokens=position - start + 1, **common)
        yield from entry(result, start)
    if session.running.concurrency != "concurrent":
        return
    for copies in sorted({2, session.running.max_draft_tokens + 1} - {1}):
        results = session.generate_many([prompt] * copies, max_new_tokens=position + 1, **common, **forbidding)
        for result in results:
            yield from entry(result, 0)


def _by_token(entry: TokenLogprobs) -> _Values:
    return {**dict(entry.top), entry.token_id: entry.logprob}
