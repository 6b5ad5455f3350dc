"""A server's abilities: found out before the first request, from its endpoints and two short generations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from polydraft.engine_parts.http_client import MalformedAnswerError
from polydraft.errors import ModelNotFoundError, NonFiniteLogitsError, PolydraftError, UnsupportedError

from polydraft_vllm.server.client import EndedByErrorError
from polydraft_vllm.server.request import End, ServerRequest
from polydraft_vllm.server.statistics import CounterReading
from polydraft_vllm.settings import PLAIN_FLAG

if TYPE_CHECKING:
    from polydraft.contract import LoadRequest, Tokenizer

    from polydraft_vllm.server.client import ServedModel, ServerClient

__all__ = ["Abilities", "inspect"]

_TEXT = "def add(first, second):\n    return first + second  # 1234 \u00e4\u4e2d\n"
_PROBE_TOKENS = 24
_USUAL_LENGTH = 4096
"""Of the context, where the server does not say it."""
_MOST = 2**31


@dataclass(frozen=True, slots=True)
class Abilities:
    """The abilities of a server."""

    version: str
    model: str
    """Its name for the target."""
    root: str
    """The path or Hub id from which it loaded the target."""
    context_length: int
    speculates: bool | None
    """None: neither its responses nor its counters say."""
    num_speculative_tokens: int | None
    """Its k; None if it does not speculate or does not report it."""
    reports_requests: bool
    """Whether responses contain their statistics."""
    plain_requests: bool
    """Whether it can decode single requests without drafts: its scheduler is polydraft's."""


def inspect(
    client: ServerClient, request: LoadRequest, tokenizer: Tokenizer, name: str | None, dtype: str = ""
) -> Abilities:
    """Find out what the server can do. It serves the target under ``name``; None: the target's own.

    ``dtype``: as known of a server that was started here, with polydraft's scheduler; empty: another one.

    Raises:
        BackendUnavailableError: Nothing answers, or it is not a vLLM server.
        ModelNotFoundError: It serves another model.
        UnsupportedError: It is too old.
        NonFiniteLogitsError: The target computes NaN or infinite logits.
    """
    try:
        version = client.version()
        model = _find(client, request, name)
        _compare_tokens(client, model, tokenizer)
        prompt = tokenizer.encode(_TEXT * 4)
        vocab_size = tokenizer.vocab_size
        send = partial(_generate, client, model, prompt, vocab_size, dtype)
        usual = send(plain=False)
        speculates = usual is not None or CounterReading(client).speculates
        if usual is not None:
            plain = send(plain=True)
            drafted = [usual["num_draft_tokens"], plain and plain["num_draft_tokens"]]
        else:
            drafted = [_counted_drafts(client, partial(send, plain=plain)) for plain in (False, True) if speculates]
        return Abilities(
            version=version,
            model=model.id,
            root=model.root,
            context_length=_counted(model.max_model_len or _USUAL_LENGTH),
            speculates=speculates,
            num_speculative_tokens=None if usual is None else _counted(usual["num_spec_tokens"]),
            reports_requests=usual is not None,
            plain_requests=drafted[1:] == [0] and bool(drafted[0]),
        )
    except MalformedAnswerError as error:
        raise client.not_vllm() from error
    except PolydraftError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # JSON of another shape
        raise client.not_vllm() from error


def _counted(found: object) -> int:
    """A number of tokens, from JSON."""
    if type(found) is not int or not 0 < found < _MOST:
        raise ValueError(f"{found!r} is not a number of tokens")
    return found


def _counted_drafts(client: ServerClient, generate: Callable[[], Any]) -> int | None:
    """The draft tokens of a request by the server's counters; None: it did not run alone."""
    before = CounterReading(client)
    generate()
    counted = CounterReading(client).since(before)
    return None if counted is None else counted.num_draft_tokens


def _find(client: ServerClient, request: LoadRequest, name: str | None) -> ServedModel:
    models = client.models()
    wanted = (name,) if name else (request.target.id, str(request.target.path or ""))
    for model in models:
        if model.is_called(*wanted):
            return model
    served = client.shown(", ".join(model.id for model in models))
    raise ModelNotFoundError(
        f"The vLLM server at {client.url} serves {served}, not {name or request.target.id}.",
        "Check the url, or give the model's name on that server as served_model_name.",
    )


def _compare_tokens(client: ServerClient, model: ServedModel, tokenizer: Tokenizer) -> None:
    found = client.tokenize(model.id, _TEXT)
    if found is not None and found != tokenizer.encode(_TEXT):
        raise ModelNotFoundError(
            f"The model {model.id} of the vLLM server at {client.url} has a different tokenizer from the target's.",
            "It is another model: check the url, or load that model.",
        )


def _generate(
    client: ServerClient, model: ServedModel, prompt: list[int], vocab_size: int, dtype: str, *, plain: bool
) -> Any:
    """``metrics.speculative_decoding`` of a short greedy generation, or None; its log-probabilities must be finite."""
    room = _counted(model.max_model_len or _USUAL_LENGTH) - _PROBE_TOKENS
    prompt = prompt[:room]
    body: dict[str, Any] = {"model": model.id, "prompt": prompt, "max_tokens": _PROBE_TOKENS, "logprobs": 0}
    body |= {"temperature": 0.0, "return_token_ids": True, "ignore_eos": True, "return_tokens_as_token_ids": True}
    if plain:
        body["vllm_xargs"] = {PLAIN_FLAG: 1}
    sent = ServerRequest(client, vocab_size, body)
    count = 0
    try:
        while not isinstance(found := sent.next(), End):  # it ends after read_timeout at the latest
            if found is not None:
                for index, entry in enumerate(found.logprobs or (), start=count):
                    if not math.isfinite(entry.logprob):
                        raise NonFiniteLogitsError.at(None, len(prompt) + index, dtype)
                count += len(found.token_ids)
    except EndedByErrorError as error:
        if not dtype:  # whose scheduler it is, is not known
            raise
        raise NonFiniteLogitsError.at(None, len(prompt) + count, dtype) from error
    if count == 0:
        raise UnsupportedError(
            f"The vLLM server at {client.url} returns no token ids.", "Use vLLM 0.10.2 or newer there."
        )
    return found.speculation
