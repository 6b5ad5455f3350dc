"""Render chat templates as Transformers does, in a process that can be stopped.

A template is a program of the checkpoint's author. It gets 512 MiB, 5 seconds and no files, in one process for all
sessions, which starts with the first chat prompt (about 0.1 s) and ends with this one.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import marshal
import os
import secrets
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from polydraft.errors import ContextLengthError, InvalidRequestError, ModelFormatError, PolydraftError, UnsupportedError

__all__ = ["OverLimitsError", "render"]

_PROGRAM = Path(__file__).with_name("_template_process.py")
_MEMORY = 512 * 2**20
_SECONDS = 5.0
_SECONDS_TO_START = 60.0
_LONGEST = 32 * 2**20
"""Characters of a result: several times what the longest contexts hold."""
_MARSHAL = 4
"""Version of the format, which all supported versions of Python read."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_INSTEAD = "Give another template as `chat_template_kwargs={'chat_template': '...'}`, or the prompt as text."


class OverLimitsError(Exception):
    """Cause of the error for a template that exceeds its limits: rendering other messages would take as long."""


def render(
    source: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], *, open_end: bool, own: bool
) -> str:
    """The text of messages.

    Args:
        source: The template.
        messages: The messages.
        values: All other variables.
        open_end: End with the last message's text; else with what the template writes before an answer.
        own: Whether the template is the model's; else it is the caller's.

    Raises:
        ContextLengthError: The messages are far longer than any context.
        InvalidRequestError: The template refuses the messages, or leaves out the message to be continued; or it fails,
            and is the caller's.
        ModelFormatError: The model's template fails, or exceeds its limits.
        UnsupportedError: This program cannot start a process of Python.
    """
    # Behind the message to be continued, to find its end in the result; a text that no message has.
    mark = f"END{secrets.token_hex(8).upper()}"
    wanted = ""
    try:
        chat = [_with_reasoning(_plain(message)) for message in messages]
        if open_end:
            wanted = _mark_end(chat[-1], mark)
        variables = {"tools": None, "documents": None, **_plain(values), "messages": chat}
        variables["add_generation_prompt"] = not open_end
        now = datetime.now()
        request = marshal.dumps((source, variables, (*now.timetuple()[:6], now.microsecond)), _MARSHAL)
    except PolydraftError:
        raise
    except (RecursionError, ValueError) as error:  # the latter is marshal's
        raise InvalidRequestError(
            "The messages, tools or variables of the template are nested too deeply.", "Nest them less deeply."
        ) from error
    outcome, text = _process.ask(request)
    if outcome in "ml" and len(request) > _LONGEST // 4:
        raise ContextLengthError(
            f"The messages take {len(request) / 2**20:.0f} MiB, which no chat template can be rendered with.",
            "Give fewer or shorter messages.",
        )
    if outcome != "t":
        raise _failure(outcome, text, own=own) from (None if outcome in "rsf" else OverLimitsError())
    return _open(text, wanted, mark) if open_end else text


def _failure(outcome: str, text: str, *, own: bool) -> PolydraftError:
    whose = "The model's chat template" if own else "The chat template that was given"
    if outcome == "r":
        end = "" if text.endswith((".", "!", "?")) else "."
        return InvalidRequestError(f"{whose} refuses the messages: {text}{end}", "Check the roles and their order.")
    reasons = {
        "s": f"is not valid Jinja: {text}",
        "f": f"fails: {text}",
        "m": f"needs more than {_MEMORY // 2**20} MiB of memory",
        "l": f"writes more than {_LONGEST // 10**6} million characters",
        "d": f"runs for more than {_SECONDS:g} seconds",
    }
    reason = reasons.get(outcome, "ends the process that renders it").removesuffix(".")
    if own:
        fault = "or cannot take such messages" if outcome == "f" else "not the messages"
        return ModelFormatError(f"{whose} {reason}.", f"The template is at fault, {fault}. {_INSTEAD}")
    return InvalidRequestError(f"{whose} {reason}.", "Correct it, or use the model's own.")


def _plain(value: Any) -> Any:
    """The value in types of JSON (and tuples), which have no methods that do harm; others become their type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    # Subclasses, such as an enum's members or numpy's numbers, become the type itself.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_plain, value)] if isinstance(value, list) else (*map(_plain, value),)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump())
    if callable(item := getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        return _plain(item())
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Transformers' names for a message's thinking, of which templates read one or the other."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _mark_end(message: dict[str, Any], mark: str) -> str:
    """Append the mark, and a space, which shows whether the template strips messages. Returns the text before."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = f"{content}{mark} "
        return content
    for part in reversed(content or ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = f"{text}{mark} "
            return text
    raise InvalidRequestError("The message to be continued has no text.", "Give its content some text, or ''.")


def _open(text: str, wanted: str, mark: str) -> str:
    """The text up to the end of the last message, which is ``wanted``."""
    before, found, after = text.rpartition(mark)
    before = before.replace(f"{mark} ", "").replace(mark, "")  # of a template that writes the message twice
    if not found or wanted.strip() not in before:
        raise InvalidRequestError(
            "The chat template leaves out a part of the message to be continued.",
            "Continue another message, or leave `continue_final_message` out.",
        )
    # A template that removes the space behind the mark strips messages.
    return before if after.startswith(" ") else before.rstrip()


class _Process:
    """The process that renders, for all threads in turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> tuple[str, str]:
        """Outcome and text of a request: those of ``_template_process``, ``d`` after the time, ``e`` if it ended."""
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self.end()
                self._running = _start()
            running = self._running
            late = threading.Event()
            try:
                with _killed_after(_SECONDS, running, late):
                    _send(running, struct.pack("<I", len(request)) + request)
                    outcome = _receive(running, 1).decode()
                    text = _receive(running, int.from_bytes(_receive(running, 4), "little")).decode()
            except (OSError, EOFError):
                outcome, text = ("d" if late.is_set() else "e"), ""
            except BaseException:  # Ctrl+C: the answer is still to come, and would be taken for the next one's
                self.end()
                raise
            if outcome not in "trsf":  # its memory is used up, or it is gone
                self.end()
            return outcome, text

    def end(self) -> None:
        """End it, if it runs."""
        running, self._running = self._running, None
        if running is not None:
            _close(running)
            running.kill()
            running.wait()

    def forget(self) -> None:
        """After a fork: it belongs to the parent, whose lock may be held forever here."""
        self._lock = threading.Lock()
        running, self._running = self._running, None
        if running is not None:
            _close(running)
            running.returncode = 0  # else its collection would complain that it still runs


def _start() -> subprocess.Popen[bytes]:
    from multiprocessing import spawn

    # Not ``sys.executable``: an app that embeds Python names its interpreter with ``multiprocessing.set_executable``.
    python = os.fsdecode(spawn.get_executable() or "")
    # Of a frozen app, ``sys.executable`` is the app itself, which would start again.
    usable = bool(python) and not (getattr(sys, "frozen", False) and python == sys.executable)
    specs = map(importlib.util.find_spec, ("jinja2", "markupsafe"))
    folders = sorted({str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin})
    limits = map(str, (_MEMORY, _LONGEST, round(_SECONDS) + 1))
    command = [python, "-I", "-S", str(_PROGRAM), *limits, *folders]
    running, ready = None, False
    if usable:
        with suppress(OSError):
            running = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl+C in a terminal is not for it
            )
    if running is not None:
        with suppress(OSError, EOFError), _killed_after(_SECONDS_TO_START, running):
            ready = _receive(running, 1) == b"o"
        if ready:
            return running
        _close(running)
        running.kill()
        running.wait()
    raise UnsupportedError(
        f"Chat templates are rendered in a process of Python, and {python or 'no program'} does not start one.",
        "Name a Python of this version with `multiprocessing.set_executable(path)`, or give prompts as text.",
    )


@contextmanager
def _killed_after(
    seconds: float, running: subprocess.Popen[bytes], late: threading.Event | None = None
) -> Iterator[None]:
    def kill() -> None:
        if late is not None:
            late.set()
        running.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _send(running: subprocess.Popen[bytes], data: bytes) -> None:
    assert running.stdin is not None
    rest = memoryview(data)
    while rest:  # the pipe takes a part at a time
        rest = rest[running.stdin.write(rest) :]


def _receive(running: subprocess.Popen[bytes], count: int) -> bytes:
    assert running.stdout is not None
    parts: list[bytes] = []
    while count:
        part = running.stdout.read(count)
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _close(running: subprocess.Popen[bytes]) -> None:
    for stream in (running.stdin, running.stdout):
        if stream is not None:
            stream.close()


_process = _Process()
atexit.register(_process.end)
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_process.forget)
