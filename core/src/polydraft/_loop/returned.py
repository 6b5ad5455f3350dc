"""Check what an engine returns: one rule for what steps choose, drafters propose and whole engines emit."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from polydraft.contract.results import TokenLogprobs
from polydraft.contract.stepping import Proposal, Step
from polydraft.errors import EngineError

__all__ = [
    "ContractError",
    "checked_count",
    "checked_ids",
    "checked_logprobs",
    "checked_proposal",
    "checked_seconds",
    "checked_step",
    "defect",
]


class ContractError(EngineError):
    """The engine broke the contract. A session raises it as an ``EngineError`` that names the backend."""


def defect(message: str) -> ContractError:
    """The error for an engine that breaks the contract."""
    return ContractError(message, "This is a defect of the backend; report it to its authors.")


def checked_ids(token_ids: Any, most: int, vocab_size: int, what: str) -> Iterator[int]:
    """The first ``most`` token ids, one by one, as Python ints; errors start with ``what`` ("The engine emitted").

    Raises:
        EngineError: They are not a series, or one of them is not a whole number from 0 to ``vocab_size - 1``.
    """
    # Lists and tuples first: ``Iterable`` takes longer to tell, and this runs twice per round.
    if not isinstance(token_ids, (list, tuple)) and (
        not isinstance(token_ids, Iterable) or isinstance(token_ids, (str, bytes, dict, set, frozenset))
    ):
        raise defect(f"{what} a {type(token_ids).__name__} in place of a list of token ids.")
    for given in islice(token_ids, most):
        token_id = given if type(given) is int else _index(given)
        if token_id is None:
            raise defect(f"{what} {reprlib.repr(given)}, which is not a token id.")
        if not 0 <= token_id < vocab_size:
            raise defect(f"{what} the token id {token_id}; ids go from 0 to {vocab_size - 1}.")
        yield token_id


def checked_count(count: Any, name: str) -> int | None:
    """A number of tokens: None if it is not reported.

    Raises:
        EngineError: It is neither None nor a whole number of at least 0.
    """
    if count is None:
        return None
    number = count if type(count) is int else _index(count)
    if number is None or number < 0:
        raise defect(f"The engine reported {name}={reprlib.repr(count)}, which is not a number of tokens.")
    return number


def checked_seconds(seconds: Any) -> float | None:
    """A time in seconds: None if it is not reported.

    Raises:
        EngineError: It is neither None nor a finite number of at least 0.
    """
    if seconds is None:
        return None
    try:
        number = float(seconds)
    except Exception:
        number = math.nan
    if not 0 <= number < math.inf:
        raise defect(f"The engine reported {reprlib.repr(seconds)} seconds, which is not a time.")
    return number


def checked_logprobs(logprobs: Any, token_ids: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities of ``token_ids``; entries after them are dropped.

    Raises:
        EngineError: An entry is missing, of another token or type, or lists NaN. (``Generation.emit`` refuses tokens
            whose own log-probability is NaN: their logits are, too.)
    """
    if not isinstance(logprobs, Sequence) or len(logprobs) < len(token_ids):
        given = f"{len(logprobs)} of them" if isinstance(logprobs, Sequence) else f"a {type(logprobs).__name__}"
        raise defect(f"The engine gave {given} as the log-probabilities of {len(token_ids)} tokens.")
    kept = tuple(logprobs[: len(token_ids)])
    for token_id, entry in zip(token_ids, kept, strict=True):
        if not isinstance(entry, TokenLogprobs) or entry.token_id != token_id:
            raise defect(f"The engine gave {reprlib.repr(entry)} as the log-probabilities at token {token_id}.")
        if any(math.isnan(value) for _, value in entry.top):
            raise defect(f"The engine gave NaN as a log-probability at token {token_id}.")
    return kept


def checked_step(step: Any, method: str, ids: int, wants_logprobs: bool) -> Step:
    """What prefill or verify returned for ``ids`` ids. ``Generation.emit`` checks the chosen ids that are emitted.

    Raises:
        EngineError: It is no ``Step``, or has not one token, and one log-probability if asked for, for each row.
    """
    rows = ids if method == "verify" else 1
    if not isinstance(step, Step):
        raise defect(f"{method} returned a {type(step).__name__}, not a `Step`.")
    token_ids: Any = step.token_ids
    if not isinstance(token_ids, (list, tuple)):
        raise defect(f"{method} returned a {type(token_ids).__name__} as `Step.token_ids`, not a list of token ids.")
    if token_ids and isinstance(token_ids[0], (list, tuple)):
        raise defect(
            f"{method} returned lists inside `Step.token_ids`: `sampler.choose` returns two things, the ids and their "
            "log-probabilities, and `Step` takes them apart: `Step(chosen, logits, logprobs)`."
        )
    if len(token_ids) != rows:
        rule = (
            "one id is chosen for each id that is run, so `run_token_ids` of `sampler.choose` are the ids of all rows, "
            "not the last one"
            if method == "verify"
            else "one id is chosen, the one after the prompt"
        )
        raise defect(f"{method} ran {_number(ids)} but chose {len(token_ids)}: {rule}.")
    if wants_logprobs and (not isinstance(step.logprobs, (list, tuple)) or len(step.logprobs) != rows):
        given = "none" if step.logprobs is None else reprlib.repr(step.logprobs)
        raise defect(
            f"{method} returned {given} as the log-probabilities of {_number(rows)}: `Step.logprobs` is the second "
            "thing that `sampler.choose` returns."
        )
    return step


def checked_proposal(proposal: Any, newest: int, k: int, vocab_size: int) -> list[int]:
    """The tokens of a proposal, checked before the target runs them: on a GPU a wrong id ends the whole process.

    Raises:
        EngineError: It is no ``Proposal``, has more than k tokens, or what is no token id.
    """
    if not isinstance(proposal, Proposal):
        raise defect(f"propose returned a {type(proposal).__name__}, not a `Proposal`.")
    draft = list(checked_ids(proposal.token_ids, k + 1, vocab_size, "The engine's drafter proposed"))
    if len(draft) > k:
        also = ", and the newest token is none of them" if draft[0] == newest else ""
        raise defect(f"The engine's drafter proposed more than the {k} tokens that were asked for: drafts only{also}.")
    return draft


def _number(ids: int) -> str:
    return "1 id" if ids == 1 else f"{ids} ids"


def _index(value: Any) -> int | None:
    """A whole number, also of numpy, torch, ..., as Python's; None for anything else, ``True`` included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except Exception:  # whatever the object's own method raises
        return None
