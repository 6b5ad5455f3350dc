"""Measuring on a whole engine, through the log-probabilities that it reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft.verification._verdict import Tie

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft._session.session import Session
    from polydraft.contract.results import TokenLogprobs

__all__ = ["tie_from_logprobs"]

_BEST = 5
"""Tokens whose log-probabilities are asked for; engines limit the number."""
_SAMPLES = 8
"""At about this many positions the noise is measured."""


def tie_from_logprobs(
    session: Session,
    prompt_token_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    position: int,
    *,
    ignore_eos: bool = True,
) -> Tie | str:
    """Decode plainly again with log-probabilities, and score the same prefixes in one prefill each: the control.

    For greedy outputs only: what an engine adds when it samples is not known.

    Args:
        session: A session whose backend claims the setting ``logprobs``.
        prompt_token_ids: The prompt.
        expected: Plain output.
        found: The other output.
        position: Index of the first token that differs; both have one there.
        ignore_eos: The outputs' setting: an engine may forbid EOS where it is True.

    Returns:
        A sentence where plain decoding does not repeat itself up to the difference: then nothing can be measured.
    """
    settings: dict[str, Any] = {"speculate": "off", "temperature": 0.0, "ignore_eos": ignore_eos, "logprobs": _BEST}
    plain = session.generate(list(prompt_token_ids), max_new_tokens=position + 1, **settings)
    if plain.token_ids != tuple(expected[: position + 1]) or plain.logprobs is None:
        return "Plain decoding does not repeat itself up to the difference, so nothing can be measured."

    def prefilled(index: int) -> TokenLogprobs:
        prefix = [*prompt_token_ids, *expected[:index]]
        result = session.generate(prefix, max_new_tokens=1, **settings)
        assert result.logprobs is not None
        return result.logprobs[0]

    noise = []
    step = max(1, position // _SAMPLES)
    # From 1: token 0 comes from a prefill both times.
    for index in range(1, position, step):
        left, right = _by_token(plain.logprobs[index]), _by_token(prefilled(index))
        noise += [abs(left[token] - right[token]) for token in left.keys() & right.keys()]
    here = _by_token(plain.logprobs[position])
    other = here.get(found[position])
    own = here[expected[position]]
    return Tie(
        source="logprobs",
        values=(own, other),
        # A difference of log-probabilities is one of logits: the normaliser cancels.
        margin=None if other is None else own - other,
        noise=max(noise, default=None),
        control=(prefilled(position).token_id,),
    )


def _by_token(entry: TokenLogprobs) -> dict[int, float]:
    return {**dict(entry.top), entry.token_id: entry.logprob}
