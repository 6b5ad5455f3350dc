"""Measuring on a whole engine, through the log-probabilities that it reports."""

from __future__ import annotations

from itertools import chain
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
_COPIES = (2, 3, 5, 8, 16)
"""Equal prompts in a batch: how many rows a step has decides in which order sums are made, as in rounds."""

_Values = dict[int, float]
"""Token -> log-probability."""


class _Runs:
    """Plain runs of one prompt.

    Args:
        session: The session.
        prompt: Token ids.
        settings: Of the outputs that are compared; None: greedy ones that EOS does not end.
    """

    def __init__(self, session: Session, prompt: Sequence[int], settings: GenerationSettings | None) -> None:
        self._session = session
        self._prompt = list(prompt)
        asked = settings or DEFAULT_SETTINGS
        self._forbidding: dict[str, Any] = {
            name: value for name in FORBIDDING if (value := getattr(asked, name)) != getattr(DEFAULT_SETTINGS, name)
        }
        self.forbids = bool(self._forbidding)
        """Whether some tokens may not come in the outputs."""
        self._common: dict[str, Any] = {
            "speculate": "off",
            "temperature": 0.0,
            "logprobs": _BEST,
            "ignore_eos": settings is None or settings.ignore_eos,
        }

    def outputs(self, count: int, copies: int = 1) -> list[GenerationResult]:
        """Outputs of this many tokens with the settings, of several equal prompts at once."""
        forbidding = dict(self._forbidding)
        if "min_new_tokens" in forbidding:
            forbidding["min_new_tokens"] = min(forbidding["min_new_tokens"], count)
        return self._session.generate_many([self._prompt] * copies, max_new_tokens=count, **self._common, **forbidding)

    def continued(self, output: Sequence[int], count: int = 1, copies: int = 1) -> list[GenerationResult]:
        """Outputs of this many tokens after a prefill of the prompt and ``output``; any token may come."""
        prompts = [[*self._prompt, *output]] * copies
        return self._session.generate_many(prompts, max_new_tokens=count, **self._common)


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
    running = session.running
    runs = _Runs(session, prompt_token_ids, settings)
    (plain,) = runs.outputs(min(position + 1 + _SAMPLES, running.context_length - len(prompt_token_ids)))
    output, scores = plain.token_ids, plain.logprobs
    if output[: position + 1] != tuple(expected[: position + 1]) or scores is None:
        return "Plain decoding does not repeat itself up to the difference, so nothing can be measured."
    own, other = expected[position], found[position]

    def gap(index: int, entry: TokenLogprobs) -> float | None:
        """The largest difference of the values at this index; None: no token is in both."""
        left, right = _by_token(scores[index]), _by_token(entry)
        shift, scale, chosen = 0.0, 1.0, output[index]
        if runs.forbids:
            if chosen not in right:
                return None
            # The difference of two logits may be off by what both are.
            shift, scale = left[chosen] - right[chosen], 0.5
        shared = left.keys() & right.keys() - ({chosen} if runs.forbids else set())
        return max((scale * abs(left[token] - right[token] - shift) for token in shared), default=None)

    def choice(entry: TokenLogprobs) -> int:
        """What a prefill chose, or would choose of the two."""
        if not runs.forbids:
            return entry.token_id
        values = _by_token(entry)
        return max((own, other), key=lambda token: (values.get(token, float("-inf")), -token))

    def prefilled(index: int, copies: int = 1) -> list[TokenLogprobs]:
        """The token at this index after a prefill of all tokens before it."""
        return [result.logprobs[0] for result in runs.continued(output[:index], copies=copies) if result.logprobs]

    # From 1: token 0 comes from a prefill both times.
    indices = [*range(1, position, max(1, position // _SAMPLES)), *range(position + 1, len(output))]
    gaps = [gap(index, entry) for index in indices for entry in prefilled(index)]
    noise = [value for value in gaps if value is not None]
    here = _by_token(scores[position])
    # A difference of log-probabilities is one of logits: the normaliser cancels.
    margin = here[own] - here[other] if other in here else None
    control = [choice(entry) for entry in prefilled(position)]
    noise_alone = None
    if margin is not None and abs(margin) > MARGIN_LIMIT * max(noise, default=0.0):
        if running.has_experts and reroutes(running.precision):
            ways = [*_decoded(session, runs, output, position)]
            control += [entry.token_id for entry in ways]
            noise_alone = max((value for entry in ways if (value := gap(position, entry)) is not None), default=None)
    elif margin is not None and other not in control:
        copies = _COPIES if running.concurrency == "concurrent" else ()
        of_prefills = (choice(entry) for number in copies for entry in prefilled(position, number))
        of_steps = (entry.token_id for entry in _decoded(session, runs, output, position))
        for token in chain(of_steps, of_prefills):
            control.append(token)
            if token == other:
                break
    return Tie(
        source="logprobs",
        values=(here[own], here.get(other)),
        margin=margin,
        noise=max(noise, default=None),
        noise_alone=noise_alone,
        control=tuple(control),
    )


def _decoded(session: Session, runs: _Runs, output: Sequence[int], position: int) -> Iterator[TokenLogprobs]:
    """The token at this index of a plain output, decoded by steps of one token after the same ones, in other ways."""

    def entry(result: GenerationResult, start: int) -> Iterator[TokenLogprobs]:
        index = position - start
        if result.logprobs and len(result.token_ids) > index and result.token_ids[:index] == output[start:position]:
            yield result.logprobs[index]

    # A grammar cannot start in the middle of a text.
    for start in () if runs.forbids else [position - back for back in _BACK if 0 < back < position]:
        for result in runs.continued(output[:start], position - start + 1):
            yield from entry(result, start)
    for copies in _COPIES if session.running.concurrency == "concurrent" else ():
        for result in runs.outputs(position + 1, copies):
            yield from entry(result, 0)


def _by_token(entry: TokenLogprobs) -> _Values:
    return {**dict(entry.top), entry.token_id: entry.logprob}
