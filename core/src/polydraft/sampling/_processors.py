"""Logits processors: which are accepted, and how a stateful one is moved along drafts and back."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal

from polydraft._containment import is_callers_own
from polydraft.errors import InvalidRequestError, LogitsProcessorError

if TYPE_CHECKING:
    from polydraft.contract.arrays import ArrayOps

__all__ = ["ProcessorRun", "processor_kind"]

# ``id`` of each stateful processor that a generation of this process is using.
_IN_USE: set[int] = set()
_IN_USE_LOCK = threading.Lock()


def processor_kind(processor: Any) -> Literal["pure", "stateful"]:
    """Classify a processor.

    Functions (lambdas, built-in ones, partials of them, static and class methods) count as pure. An object is accepted
    only if it can be rolled back: a hidden state would retain rejected drafts.

    Raises:
        InvalidRequestError: It is neither pure nor stateful, or cannot be called with two arguments.
    """
    if not callable(processor):
        raise InvalidRequestError(
            f"`logits_processor` is {processor!r}, which cannot be called.",
            "Give a function (prefix_ids, logits) -> logits.",
            argument="logits_processor",
        )
    methods = [name for name in ("accept", "rollback") if callable(getattr(processor, name, None))]
    kind: Literal["pure", "stateful"]
    if len(methods) == 2 and not isinstance(processor, type):
        kind = "stateful"
    elif _is_function(processor):
        kind = "pure"
    else:
        name = processor.__qualname__ if isinstance(processor, type) else type(processor).__qualname__
        raise InvalidRequestError(
            f"`logits_processor` is {'the class' if isinstance(processor, type) else 'an object of'} {name}, which may "
            "keep a state that cannot be taken back when a draft is rejected.",
            "Give it accept(token_id) and rollback(num_tokens), or, if it keeps no state, wrap it in a function.",
            argument="logits_processor",
        )
    # Of an object, ``__call__`` may be a coroutine function; calling looks it up on the type.
    target = processor if kind == "pure" else type(processor).__call__
    if inspect.iscoroutinefunction(target) or inspect.isgeneratorfunction(target):
        raise InvalidRequestError(
            "`logits_processor` is a coroutine or generator function.",
            "Give a function that returns the logits.",
            argument="logits_processor",
        )
    try:
        inspect.signature(processor).bind((), None)
    except TypeError as error:
        raise InvalidRequestError(
            f"`logits_processor` cannot be called with two arguments: {error}.",
            "Give a function (prefix_ids, logits) -> logits.",
            argument="logits_processor",
        ) from error
    except ValueError:
        pass  # a built-in function without a signature
    return kind


def _is_function(processor: Any) -> bool:
    if isinstance(processor, functools.partial):
        return _is_function(processor.func)
    if isinstance(processor, MethodType):
        # Bound to a class it is a class method; bound to an object it may keep a state there.
        return isinstance(processor.__self__, type)
    return isinstance(processor, FunctionType | BuiltinFunctionType)


class ProcessorRun:
    """A processor in one generation.

    It is only called for, and moved to, prefixes that it allows itself: those of tokens whose logits it left above
    ``-inf``, and of forced tokens. Rows after a draft that it forbids are skipped: plain decoding would never get
    there, and a grammar's ``accept`` may refuse such a token.

    Args:
        ops: The operations of the logits' library.
        processor: The user's processor.
        prompt_length: Number of the prompt's tokens.
        forced: Absolute position -> forced token.

    Raises:
        InvalidRequestError: It is neither pure nor stateful; or stateful, and in use by another generation.
    """

    def __init__(self, ops: ArrayOps[Any], processor: Any, prompt_length: int, forced: Mapping[int, int]) -> None:
        self._ops = ops
        self._processor = processor
        self._prompt_length = prompt_length
        self._forced = forced
        self._stateful = processor_kind(processor) == "stateful"
        self._reset = getattr(processor, "reset", None) if self._stateful else None
        self._fed: list[int] = []  # output tokens that its state reflects
        self._certain = 0  # how many of them are known to be committed
        self._asked: tuple[int, list[int], Any] = (-1, [], None)  # committed length, tokens after it, processed logits
        self._open = False
        if self._stateful:
            with _IN_USE_LOCK:
                if id(processor) in _IN_USE:
                    raise InvalidRequestError(
                        "This `logits_processor` keeps a state, and another generation is using it.",
                        "Make one for each generation that runs at the same time.",
                        argument="logits_processor",
                    )
                _IN_USE.add(id(processor))
            self._open = True
            if callable(self._reset):
                self._move_by(self._reset)

    def apply(
        self, logits: Any, committed: Sequence[int], run_token_ids: Sequence[int], *, certain: bool
    ) -> Any | None:
        """The processed logits of one row.

        Args:
            logits: Float32, shape (1, vocab).
            committed: Tokens before ``run_token_ids``.
            run_token_ids: The newest token and the drafts after it, as far as the row sees them.
            certain: Whether this prefix is certainly part of the output. If not, an error of the processor is ignored.

        Returns:
            Shape (1, vocab); None for a prefix that the processor does not allow.

        Raises:
            LogitsProcessorError: It failed, or returned unusable logits.
        """
        if not self._allows(len(committed), run_token_ids):
            return None
        if self._stateful:
            self._move(committed, run_token_ids)
        try:
            processed = self._ask(logits, (*committed, *run_token_ids))
        except LogitsProcessorError:
            if certain:
                raise
            return None
        self._asked = (len(committed), list(run_token_ids), processed)
        return processed

    def close(self, output: Sequence[int]) -> None:
        """End the generation: the state goes to the emitted tokens, or back to the start if it has no ``reset``."""
        if not self._open:
            return
        try:
            if callable(self._reset):
                # ``output`` has no prompt in front of it.
                self._prompt_length = 0
                self._move(output, ())
            elif self._fed:
                self._move_by(self._processor.rollback, len(self._fed))
        finally:
            self._release()

    def _release(self) -> None:
        self._open = False
        with _IN_USE_LOCK:
            _IN_USE.discard(id(self._processor))

    def _allows(self, committed: int, tail: Sequence[int]) -> bool:
        """Whether the tokens after the newest one were allowed, each by the row before it."""
        asked_at, asked, processed = self._asked
        # If the row asked for last is a proper prefix of this one, its logits show whether the next token was allowed.
        known = asked_at == committed and list(tail[: len(asked)]) == asked and len(tail) > len(asked)
        start = len(asked) if known else 1
        for index in range(start, len(tail)):
            if self._forced.get(committed + index) == tail[index]:
                continue
            # No row has shown whether this token is allowed.
            if not (known and index == start):
                return False
            if self._ops.tolist(self._ops.entries(processed, [0], [tail[index]]))[0] == -math.inf:
                return False
        return True

    def _ask(self, logits: Any, prefix: tuple[int, ...]) -> Any:
        row = logits[0]
        try:
            found = self._processor(prefix, row * 1.0)  # a copy, which it may change in place
        except BaseException as error:
            if is_callers_own(error):
                raise
            raise _failure("the call", error) from error
        if type(found) is not type(row) or tuple(found.shape) != tuple(row.shape):
            shape = getattr(found, "shape", None)
            raise LogitsProcessorError(
                f"The logits processor returned {type(found).__name__}{'' if shape is None else f' {tuple(shape)}'}, "
                f"not {type(row).__name__} {tuple(row.shape)}.",
                "It must return the changed logits, an array like the one it is given.",
            )
        processed = self._ops.float32(found)[None]
        largest = self._ops.tolist(self._ops.row_max(processed))[0][0]
        if not -math.inf < largest < math.inf:  # NaN, too
            what = "NaN" if math.isnan(largest) else "+inf" if largest > 0 else "no token that may be chosen"
            raise LogitsProcessorError(
                f"The logits processor left {what} for position {len(prefix)}.",
                "Leave at least one finite logit; forbid tokens by -inf, and force one by forbidding all others.",
            )
        return processed

    def _move(self, committed: Sequence[int], tail: Sequence[int]) -> None:
        """Move the state to the output tokens in ``committed``, then those in ``tail``."""
        prompt = self._prompt_length
        # The state covers the output only. Until all of the prompt is committed, the tail starts with a part of it.
        known = max(len(committed) - prompt, 0)
        extra = list(tail[max(prompt - len(committed), 0) :])
        length = known + len(extra)

        def wanted(index: int) -> int:
            return committed[prompt + index] if index < known else extra[index - known]

        # The committed part cannot have changed: comparing starts after it, so a call costs O(k), not O(length).
        common = min(self._certain, known, len(self._fed))
        while common < min(len(self._fed), length) and self._fed[common] == wanted(common):
            common += 1
        if len(self._fed) > common:
            self._move_by(self._processor.rollback, len(self._fed) - common)
            del self._fed[common:]
        for index in range(common, length):
            self._move_by(self._processor.accept, wanted(index))
            self._fed.append(wanted(index))
        self._certain = min(known, len(self._fed))

    def _move_by(self, method: Callable[..., Any], *arguments: int) -> None:
        try:
            method(*arguments)
        except BaseException as error:
            self._release()  # its state is unknown from now on
            if is_callers_own(error):
                raise
            raise _failure(f"{method.__name__}()", error) from error


def _failure(where: str, error: BaseException) -> LogitsProcessorError:
    return LogitsProcessorError(
        f"The logits processor failed in {where}: {type(error).__name__}: {error}.",
        "The text so far is in this error's partial_text.",
    )
