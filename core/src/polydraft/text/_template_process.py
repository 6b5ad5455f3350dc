"""The process that renders chat templates: a program for ``_templates`` to start, limit and end.

Run by its path, with ``-I -S`` and these arguments: the most memory in bytes, the most characters of a result, the most
seconds for one (more than ``_templates`` waits), and the folders that hold Jinja. It imports nothing of polydraft.
A request on stdin is its length (u32, little endian) and a marshalled (template, variables, local time); the answer on
stdout is an outcome (one letter), its length, and UTF-8.
"""

from __future__ import annotations

import json
import marshal
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

_LIMITS = {"RLIMIT_NOFILE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
"""What is open stays open; nothing else can be opened or written, files and sockets alike."""


def _limit(memory: int) -> None:
    """Limit this process where the system can: memory counts as address space."""
    with suppress(ImportError):
        import resource

        for name, most in {**_LIMITS, "RLIMIT_AS": memory}.items():
            # macOS has the names, and refuses some of the values.
            with suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (most, most))


def _alarm(seconds: int) -> None:
    """End this process after so many seconds, in case that the one which should is gone; 0: not any more."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _serve(requests: BinaryIO, answers: BinaryIO, memory: int, longest: int, seconds: int) -> None:
    # Imported before files are out of reach; ``debug`` is what Jinja itself imports when a template fails.
    from jinja2 import TemplateError, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    now = datetime.now()

    class RefusalError(TemplateError):
        """A template called ``raise_exception``."""

    class LengthError(Exception):
        """A template writes too much."""

    class Generation(Extension):
        """``{% generation %}``: marks what the model wrote, for training. Here its content is rendered, no more."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own way

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, as in Transformers: what is set inside stays inside.
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> Any:
            return caller()

    class Environment(ImmutableSandboxedEnvironment):
        """Refuses to repeat a text or list beyond the memory, also where the system does not limit it."""

        intercepted_binops = frozenset({"*"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            for repeated, times in ((left, right), (right, left)):
                is_repetition = isinstance(times, int) and isinstance(repeated, (str, list, tuple))
                if is_repetition and len(repeated) * times > memory:
                    raise MemoryError
            return super().call_binop(context, operator, left, right)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: Any) -> None:
        raise RefusalError(str(message))

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: now.strftime(form)  # noqa: PLW0108 - ``now`` changes
    compiled = lru_cache(maxsize=16)(environment.from_string)

    def render(source: str, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        count = 0
        for piece in compiled(source).generate(values):
            count += len(piece)
            if count > longest:
                raise LengthError
            pieces.append(piece)
        return "".join(pieces)

    def answer(request: bytes) -> tuple[bytes, bytes]:
        nonlocal now
        try:
            source, values, moment = marshal.loads(request)
            now = datetime(*moment)
            return b"t", render(source, values).encode()
        except RefusalError as error:
            return b"r", str(error).encode("utf-8", "replace")
        except TemplateSyntaxError as error:
            return b"s", f"line {error.lineno}: {error.message}".encode("utf-8", "replace")
        except MemoryError:
            return b"m", b""
        except LengthError:
            return b"l", b""
        except RecursionError:
            return b"f", b"it calls itself too deeply"
        except Exception as error:  # whatever a template's expressions raise
            return b"f", f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace")

    # Imports what is imported late.
    render("{{ [messages] | tojson }}{{ strftime_now('%d %B %Y') }}", {"messages": ""})
    render("{{ messages | striptags | wordwrap(9) | pprint }}{{ lipsum(1) }}", {"messages": "a"})
    with suppress(Exception):
        render("{{ missing.name }}", {})
    _limit(memory)
    answers.write(b"o")
    answers.flush()
    for request in _requests(requests):
        _alarm(seconds)
        outcome, text = answer(request)
        _alarm(0)
        answers.write(outcome + struct.pack("<I", len(text)) + text)
        answers.flush()


def _requests(stream: BinaryIO) -> Iterator[bytes]:
    """Requests until the other end closes the stream."""
    while len(head := stream.read(4)) == 4:
        yield stream.read(*struct.unpack("<I", head))


if __name__ == "__main__":
    # Ctrl+C in a terminal is for the program that started this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path += sys.argv[4:]
    _serve(sys.stdin.buffer, sys.stdout.buffer, *map(int, sys.argv[1:4]))
