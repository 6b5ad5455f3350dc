"""Every error that polydraft raises on purpose.

Each has one sentence that says what is wrong (``message``) and one that says what to do (``hint``).
``str(error)`` is both. Errors are raised before work is lost: before a download, before weights are loaded,
before the first token.

Sentences write commands and arguments as code, arguments as Python takes them: "Use `drafter=None` for plain
decoding.". The command line shows the same sentences with its flags in their place: "Use `--drafter none` ...".
A hint's `pip install` commands are written as for the package index: ``hint`` has what installs the same into this
environment, from where polydraft came from (`polydraft._pasteable`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

from polydraft._pasteable import pasteable
from polydraft._presentable import presentable

__all__ = [
    "BackendNotFoundError",
    "BackendUnavailableError",
    "ContextLengthError",
    "DeviceError",
    "EngineCrashedError",
    "EngineError",
    "EnvironmentSetupError",
    "ForkedSessionError",
    "InvalidRequestError",
    "LogitsProcessorError",
    "ModelFormatError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "NotSavedError",
    "NotVerifiedError",
    "OutOfMemoryError",
    "PairMismatchError",
    "PluginError",
    "PolydraftError",
    "SessionBusyError",
    "SessionClosedError",
    "SpeculationUnavailableError",
    "StructuredOutputError",
    "SystemResourceError",
    "UnsupportedError",
]

_OTHER_DTYPES = {
    "float16": "`dtype='bfloat16'` or `dtype='float32'`, whose range is larger",
    "bfloat16": "`dtype='float32'`",
}
"""What to try where numbers leave the range of a dtype."""
_OR_PLAIN = ", or use `drafter='ngram'`"


class PolydraftError(Exception):
    """Base of all errors of polydraft.

    Both sentences may hold names and texts from files and servers: control characters in them are written as escapes,
    and URLs lose their password.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do. Empty if nothing can be done.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = presentable(message)
        self.hint = presentable(pasteable(hint))
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        # What a server or a file has said is quoted as it is, with or without the end of a sentence.
        end = "." if self.hint and self.message and self.message[-1] not in ".!?:" else ""
        return f"{self.message}{end} {self.hint}".strip()


class InvalidRequestError(PolydraftError, ValueError):
    """An argument is of the wrong type or out of range.

    To mend it: correct the argument that ``argument`` names; the message says what is allowed.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do.
        argument: Name of the argument at fault, such as ``top_p``: a program may look it up, and the command line shows
            its flag. Empty if no single argument is at fault.
    """

    def __init__(self, message: str, hint: str = "", *, argument: str = "") -> None:
        super().__init__(message, hint)
        self.argument = argument


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit into the context, or the requested context is longer than the model's.

    To mend it: shorten the prompt, lower ``max_new_tokens``, or load with a larger ``context_length`` if the model
    has one.
    """


class UnsupportedError(PolydraftError):
    """The request is valid, but this backend or model cannot do it: images, an exactness mode, ...

    To mend it: leave the request out, or take a backend that can do it: ``polydraft backends`` lists what each can.
    """


class SpeculationUnavailableError(UnsupportedError):
    """``speculate="on"`` (or an explicit drafter) was asked for, and speculation cannot run.

    To mend it: take another drafter (``drafter="ngram"`` needs no model), or leave ``speculate`` open: then the
    call is decoded plainly, and ``result.speculation_off`` says why.
    """


class PluginError(PolydraftError):
    """A plugin is broken: it cannot be imported, breaks the contract, or uses a name that is taken.

    To mend it: update or uninstall the plugin, or name it in ``POLYDRAFT_DISABLE_PLUGINS``; ``polydraft doctor``
    says which it is and why.
    """


class BackendNotFoundError(PolydraftError, LookupError):
    """No backend of that name is installed.

    To mend it: run the command of the hint, usually ``polydraft engines install NAME``, or correct the name.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do.
        engine: What ``polydraft engines install`` takes to bring the backend; empty if it cannot.
    """

    def __init__(self, message: str, hint: str = "", *, engine: str = "") -> None:
        super().__init__(message, hint)
        self.engine = engine


class BackendUnavailableError(PolydraftError):
    """The backend is installed, but cannot run here: engine missing, version with a known fault, ...

    To mend it: run the command of the hint; ``polydraft doctor`` shows it for every backend.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do.
        engine: What ``polydraft engines install`` takes to mend it; empty if it cannot.
    """

    def __init__(self, message: str, hint: str = "", *, engine: str = "") -> None:
        super().__init__(message, hint)
        self.engine = engine


class EnvironmentSetupError(PolydraftError):
    """An engine's environment cannot be made, updated or removed. One that was there before is unchanged and in use.

    To mend it: do what the hint says (room on the disk, network, a compiler) and repeat the command; the log has
    the details.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do.
        log: What the commands of the installation printed; None: none was started.
    """

    def __init__(self, message: str, hint: str = "", *, log: Path | None = None) -> None:
        super().__init__(message, hint)
        self.log = log


class ModelNotFoundError(PolydraftError, LookupError):
    """The target or drafter does not exist, or may not be read (gated, offline).

    To mend it: correct the name, accept the model's terms and log in with ``hf auth login``, or, if offline, give a
    folder.
    """


class ModelFormatError(PolydraftError):
    """A checkpoint exists, but cannot be read: no config, a missing shard, an unknown architecture or format.

    To mend it: download the model again if a file is missing or damaged; else take a backend that loads its format.
    """


class PairMismatchError(PolydraftError):
    """Target and drafter do not belong together.

    To mend it: leave ``drafter`` open, name the drafter made for this target, or use ``drafter="ngram"``.
    """


class NotSavedError(PolydraftError):
    """A measurement has been made, and cannot be saved: the disk is full by now, for example.

    To mend it: ``result`` holds what was measured, and ``polydraft bench`` and ``polydraft tune`` have shown it; give
    another folder the next time.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do.
        result: What ``bench`` or ``tune`` would have returned.
    """

    def __init__(self, message: str, hint: str, result: Any) -> None:
        super().__init__(message, hint)
        self.result = result


class NotVerifiedError(PolydraftError):
    """``load(verified="require")`` found no passed verification of this configuration. The hint names the command.

    To mend it: run ``polydraft verify`` with the same model and options, as the hint says, or load without
    ``verified``.
    """


class DeviceError(PolydraftError):
    """The requested device does not exist.

    To mend it: name one of the devices that the message lists; ``polydraft doctor`` shows all.
    """


class OutOfMemoryError(PolydraftError, MemoryError):
    """The weights or the context do not fit into memory.

    To mend it: take smaller weights (``quantization``), a smaller ``context_length``, or another device;
    ``polydraft pairs MODEL`` shows what fits.
    """


class SystemResourceError(PolydraftError):
    """The machine is short of something, or refuses it: a full disk, no file handles, a failing device.

    ``__cause__`` is the system's own error, with its ``errno``.

    To mend it: free what the message names, and try again.
    """


class EngineError(PolydraftError):
    """The engine failed while running. ``partial_text`` holds the text generated until then.

    To mend it: try again; if it happens again, report it with the message, which holds the engine's own words.
    """

    def __init__(self, message: str, hint: str = "", *, partial_text: str = "") -> None:
        super().__init__(message, hint)
        self.partial_text = partial_text


class EngineCrashedError(EngineError):
    """The worker process that an engine runs in has ended: an abort, a segmentation fault, out of memory, a kill.

    Other sessions go on. The session is of no more use; ``polydraft.load`` loads the same again.

    To mend it: load it again; with ``out_of_memory``, with smaller weights or a smaller context. ``last_words`` is
    what to report.

    Args:
        message: One sentence: what is wrong.
        hint: One sentence: what to do.
        exit_code: With which it ended; None if a signal ended it.
        signal: Name of the signal that ended it, such as ``SIGKILL``; empty if none did.
        last_words: The last lines that the engine wrote to standard error.
        out_of_memory: Whether the kernel killed it because memory ran out; None if that is not known.
    """

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        partial_text: str = "",
        exit_code: int | None = None,
        signal: str = "",
        last_words: str = "",
        out_of_memory: bool | None = None,
    ) -> None:
        super().__init__(message, hint, partial_text=partial_text)
        self.exit_code = exit_code
        self.signal = signal
        self.last_words = last_words
        self.out_of_memory = out_of_memory


class NonFiniteLogitsError(EngineError):
    """The target, or its drafter, computed logits from which no token can be chosen.

    A row of logits is refused if it has NaN or +Inf, or no finite number at all; -Inf for single tokens is allowed.
    Causes are float16 that overflows, and damaged weights.

    To mend it: use a ``dtype`` of larger range, ``bfloat16`` or ``float32``, or download the weights again.
    """

    @classmethod
    def at(cls, value: float | None, position: int, dtype: str, *, drafter: bool = False) -> Self:
        """The error for one row, in the words that every backend uses.

        Args:
            value: What was found: NaN, +Inf, or -Inf where no number is finite; None: it is not known which.
            position: Absolute position, prompt included, of the token that the row chooses.
            dtype: That of ``session.running``; empty, or words such as "the server's": not known.
            drafter: Whether the row is the drafter's.
        """
        if value is None:
            what = "numbers that are not finite"
        else:
            what = "NaN" if math.isnan(value) else "+Inf" if value > 0 else "no finite number"
        computed = f" (computed in {dtype})" if dtype and " " not in dtype else ""
        whose = "drafter" if drafter else "target"
        other = f"Use {_OTHER_DTYPES[dtype]}; if that fails, too, " if dtype in _OTHER_DTYPES else "Probably "
        return cls(
            f"The {whose}'s logits for position {position} hold {what}{computed}, so "
            f"no token can be {'drafted' if drafter else 'chosen'} from them.",
            f"{other}the {whose}'s weights are damaged: download them again{_OR_PLAIN if drafter else ''}.",
        )


class LogitsProcessorError(EngineError):
    """The caller's logits processor failed, or returned unusable logits.

    To mend it: correct the processor: ``__cause__`` is what it raised.
    """


class StructuredOutputError(EngineError):
    """An output that must match (``guided``) cannot go on: it needs too much work, or no token is left to choose.

    To mend it: simplify the schema, expression or grammar, or allow more tokens.
    """


class SessionClosedError(PolydraftError, RuntimeError):
    """The session was used after ``close()``.

    To mend it: make the calls inside the session's ``with`` block, or load anew.
    """


class SessionBusyError(PolydraftError, RuntimeError):
    """The call would deadlock.

    The session runs one call at a time and this thread or task holds an unfinished stream of it, or it was called from
    inside one of its own steps (by a logits processor or a signal handler).

    To mend it: finish or close the open stream first, or use a second session or thread.
    """


class ForkedSessionError(PolydraftError, RuntimeError):
    """The session was used in a process forked from the one that loaded it.

    To mend it: load in the child process, or start it with ``multiprocessing``'s method ``spawn``.
    """
