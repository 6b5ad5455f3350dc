"""Measuring on a whole engine, through the log-probabilities that it reports."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

from polydraft.contract.requests import DEFAULT_SETTINGS
from polydraft.errors import UnsupportedError
from polydraft.verification._noise import reroutes
from polydraft.verification._verdict import MARGIN_LIMIT, Tie

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft._session.session import Session
    from polydraft.contract.requests import GenerationSettings
    from polydraft.contract.results import GenerationResult, TokenLogprobs

__all__ = ["tie_from_logprobs"]

_FORBIDDING = ("min_new_tokens", "banned_token_ids", "guided")
"""Settings that only forbid tokens: of those that are left, the one of the largest log-probability is chosen."""

_BEST, _BEST_OF_ALLOWED = 5, 20
"""Tokens whose log-probabilities are asked for; more where some of them may be forbidden. vLLM's servers give 20."""
_SAMPLES = 8
"""At about this many positions the noise is measured."""
_BACK = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tokens that are decoded up to the position, after a prefill of those before them."""
_COPIES = (2, 3, 5, 8, 16)
"""Equal prompts in a batch: how many rows a step has decides in which order sums are made, as in rounds."""
_REROUTED = 4.0
"""At most this much of the noise around it counts at a position whose token rounding sends to other experts, since an
engine whose batches or prefills are wrong would otherwise excuse itself. vLLM 0.26, tiny-26b in bfloat16: twice."""
_FAR = 64
"""Up to this position batches with a grammar are decoded; without one they start ``_BACK[-1]`` tokens before it."""


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
            name: value for name in _FORBIDDING if (value := getattr(asked, name)) != getattr(DEFAULT_SETTINGS, name)
        }
        self._stop_token_ids = asked.stop_token_ids
        self._least = asked.min_new_tokens
        self.forbids = bool(self._forbidding)
        """Whether some tokens may not come in the outputs."""
        self._common: dict[str, Any] = {
            "speculate": "off",
            "temperature": 0.0,
            "logprobs": _BEST_OF_ALLOWED if self.forbids else _BEST,
            "ignore_eos": settings is None or settings.ignore_eos,
        }

    def may_come(self, token_id: int, position: int) -> bool:
        """Whether the settings allow a token there; what a grammar allows is not known here."""
        if token_id in self._forbidding.get("banned_token_ids", ()):
            return False
        if position >= self._least:
            return True
        # Where EOS is ignored, engines differ in whether they let it come before the minimum.
        ends = () if self._common["ignore_eos"] else self._session.tokenizer.eos_token_ids
        return token_id not in {*ends, *self._stop_token_ids}

    def outputs(self, count: int, copies: int = 1) -> list[GenerationResult]:
        """Outputs of this many tokens with the settings, of several equal prompts at once."""
        forbidding = dict(self._forbidding)
        if self._least:  # the ids that it forbids as well
            forbidding |= {"min_new_tokens": min(self._least, count), "stop_token_ids": self._stop_token_ids}
        return self._run(self._prompt, copies, max_new_tokens=count, **forbidding)

    def continued(self, output: Sequence[int], count: int = 1, copies: int = 1) -> list[GenerationResult]:
        """Outputs of this many tokens after a prefill of the prompt and ``output``; any token may come."""
        return self._run([*self._prompt, *output], copies, max_new_tokens=count)

    def free(self, count: int) -> GenerationResult:
        """An output of which no token is forbidden, and that EOS does not end where the engine can ignore it."""
        ignored = {**self._common, "ignore_eos": True}
        try:
            return self._session.generate(self._prompt, **ignored, max_new_tokens=count)
        except UnsupportedError:
            return self._session.generate(self._prompt, **self._common, max_new_tokens=count)

    def _run(self, prompt: list[int], copies: int, **settings: Any) -> list[GenerationResult]:
        if copies == 1:
            return [self._session.generate(prompt, **self._common, **settings)]
        return self._session.generate_many([prompt] * copies, **self._common, **settings)

    def prefilled(self, output: Sequence[int], copies: int = 1) -> list[TokenLogprobs]:
        """The token after a prefill of the prompt and ``output``."""
        return [result.logprobs[0] for result in self.continued(output, copies=copies) if result.logprobs]


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

    For greedy outputs only: what an engine adds when it samples is not known. An engine that keeps prefixes may take
    over KV of earlier calls, these outputs' among them, in any of these runs. Where that prefill does not choose the
    other token of a near tie, the control also decodes plainly after prefills of other lengths, and, in an engine that
    batches, in batches of equal prompts, as rounds are batches of rows. In a mixture of experts rounding may send this
    position's token to other experts: what these ways, all of single steps, differ by there is ``Tie.noise_alone``.

    With settings that forbid tokens, prefills choose between the two tokens only, and the noise is measured on what
    plain decoding gives without them.

    Args:
        session: A session whose backend claims the setting ``logprobs``.
        prompt_token_ids: The prompt.
        expected: Plain output.
        found: The other output.
        position: Index of the first token that differs; both have one there.
        settings: Of both outputs; None: greedy ones that EOS does not end. Only ``ignore_eos`` (an engine may forbid
            EOS where it is True) and those that forbid tokens are looked at.

    Returns:
        A sentence where nothing can be measured: plain decoding does not repeat itself up to the difference; or where
        that is needless: the other token may not come.
    """
    running = session.running
    runs = _Runs(session, prompt_token_ids, settings)
    own, other = expected[position], found[position]
    if not runs.may_come(other, position):
        return "The other output has a token there that the settings forbid."
    # The noise is measured at positions before the difference: a defect that begins with it would set its own
    # tolerance. At the first two positions, which have none before them, later ones must do.
    room = running.context_length - len(prompt_token_ids)
    (plain,) = runs.outputs(min(position + 1 + (0 if position > 1 else _SAMPLES), room))
    output, scores = plain.token_ids, plain.logprobs
    if output[: position + 1] != tuple(expected[: position + 1]) or scores is None:
        return "Plain decoding does not repeat itself up to the difference, so nothing can be measured."

    def choice(entry: TokenLogprobs) -> Iterator[int]:
        """What a prefill chose, or would choose of the two, if that is known."""
        values = _by_token(entry)
        if not runs.forbids:
            yield entry.token_id
        elif {own, other} & values.keys():
            yield max((own, other), key=lambda token: (values.get(token, -math.inf), -token))

    # From 1: token 0 comes from a prefill both times.
    free, free_scores, indices = output, scores, [*range(1, position, max(1, position // _SAMPLES))]
    if runs.forbids:
        result = runs.free(min(_SAMPLES + 1, room))
        free, free_scores, indices = result.token_ids, result.logprobs or (), [*range(1, len(result.token_ids))]
    indices = indices or [index for index in range(1, len(free)) if index != position]
    noise = [_gap(free_scores[index], entry) for index in indices for entry in runs.prefilled(free[:index])]
    most = max(noise, default=0.0)
    here = _by_token(scores[position])
    # A difference of log-probabilities is one of logits: the normaliser cancels.
    margin = here[own] - here[other] if math.isfinite(here.get(other, math.inf)) else None
    if runs.forbids and margin is not None and margin < 0:  # plain decoding would have taken it
        return "The other output has a token there that the settings forbid."
    control = [token for entry in runs.prefilled(output[:position]) for token in choice(entry)]
    noise_alone = None
    if margin is not None and abs(margin) > MARGIN_LIMIT * most:
        if running.has_experts and reroutes(running.precision):
            for entry in _decoded(session, runs, output, position):
                control.append(entry.token_id)
                noise_alone = min(max(noise_alone or 0.0, _gap(scores[position], entry)), _REROUTED * most)
                if other in control and abs(margin) <= MARGIN_LIMIT * noise_alone:
                    break
    elif margin is not None and other not in control:
        copies = _COPIES if running.concurrency == "concurrent" else ()
        prefills = chain.from_iterable(runs.prefilled(output[:position], number) for number in copies)
        of_steps = (entry.token_id for entry in _decoded(session, runs, output, position))
        for token in chain(of_steps, chain.from_iterable(map(choice, prefills))):
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
        if not runs.forbids:
            start = max(0, position - _BACK[-1])
            for result in runs.continued(output[:start], position - start + 1, copies):
                yield from entry(result, start)
        elif position <= _FAR:
            for result in runs.outputs(position + 1, copies):
                yield from entry(result, 0)


def _gap(left: TokenLogprobs, right: TokenLogprobs) -> float:
    """The largest difference of values that both hold; 0.0: there is none."""
    one, other = _by_token(left), _by_token(right)
    gaps = (abs(one[token] - other[token]) for token in one.keys() & other.keys())
    return max((gap for gap in gaps if math.isfinite(gap)), default=0.0)


def _by_token(entry: TokenLogprobs) -> dict[int, float]:
    return {**dict(entry.top), entry.token_id: entry.logprob}
