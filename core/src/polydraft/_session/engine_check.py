"""Check a loaded engine before a session uses it."""

from __future__ import annotations

import reprlib
from collections.abc import Set
from typing import Any

from pydantic import ValidationError

from polydraft.contract.arrays import ArrayOps
from polydraft.contract.records import Capabilities
from polydraft.contract.results import RunningInfo
from polydraft.contract.stepping import SteppingEngine
from polydraft.contract.whole import WholeEngine
from polydraft.errors import PluginError

__all__ = ["check_engine"]

_METHODS = ("encode", "token_bytes", "token_id", "chat")
_OPERATIONS = tuple(name for name in vars(ArrayOps) if not name.startswith("_"))


def check_engine(engine: Any, running: Any, capabilities: Any) -> None:
    """Check what a backend loaded, and what it says about it.

    Raises:
        PluginError: The engine is not a stepping or a whole engine, or lacks or mistypes what the contract demands.
    """
    kind = type(engine).__name__
    if not isinstance(engine, SteppingEngine | WholeEngine):
        raise _broken(kind, "it is neither a SteppingEngine nor a WholeEngine")
    if not isinstance(running, RunningInfo):
        raise _broken(kind, f"its `running` is a {type(running).__name__}, not a RunningInfo")
    if not isinstance(capabilities, Capabilities):
        raise _broken(kind, f"the backend's capabilities are a {type(capabilities).__name__}")
    try:
        RunningInfo.model_validate(vars(running))  # a copy with changes has not been checked
    except ValidationError as error:
        first = error.errors()[0]
        raise _broken(kind, f"its `running` is wrong: {first['loc'][0]}: {first['msg']}") from error
    k = running.num_speculative_tokens
    if running.context_length < 1 or k < 0:
        raise _broken(kind, f"its context has {running.context_length} tokens, and its k is {k}")
    if isinstance(engine, SteppingEngine):
        _check_stepping(engine, kind, k)
    tokenizer = getattr(engine, "tokenizer", None)
    lacking = [name for name in _METHODS if not callable(getattr(tokenizer, name, None))]
    if lacking:
        raise _broken(kind, f"its tokenizer, a {type(tokenizer).__name__}, has no method {lacking[0]}")
    size = getattr(tokenizer, "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        raise _broken(kind, f"its tokenizer's vocab_size is {size!r}")
    for name in ("eos_token_ids", "special_token_ids"):
        ids: Any = getattr(tokenizer, name, None)
        if not isinstance(ids, Set) or not all(hasattr(token_id, "__index__") for token_id in ids):
            raise _broken(kind, f"its tokenizer's {name} is {reprlib.repr(ids)}, not a frozenset of token ids")
    bos: Any = getattr(tokenizer, "bos_token_id", kind)
    if bos is not None and not isinstance(bos, int):
        raise _broken(kind, f"its tokenizer's bos_token_id is {bos!r}, neither a token id nor None")


def _check_stepping(engine: SteppingEngine, kind: str, k: int) -> None:
    most: Any = engine.max_draft_tokens
    if not isinstance(most, int) or most < k:
        raise _broken(kind, f"it verifies at most {most!r} drafts, and its k is {k}")
    ops: Any = engine.array_ops
    lacking = [] if ops is None else [name for name in _OPERATIONS if not callable(getattr(ops, name, None))]
    if lacking:
        raise _broken(kind, f"its array_ops, a {type(ops).__name__}, have no method {lacking[0]}")


def _broken(kind: str, why: str) -> PluginError:
    return PluginError(f"The engine {kind} breaks the contract: {why}.", "Report it to the authors of its backend.")
