"""The answer as it is generated: raw text for pipes and files, colours on terminals that have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from polydraft._cli.streams import console_for, diagnostics, is_terminal

if TYPE_CHECKING:
    from polydraft.contract import Chunk

__all__ = ["AnswerView", "visible"]

_DRAFT, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"

# A model's text must not control the terminal: C0 characters are shown as Unicode pictures; C1 ones, and those that
# turn the direction of text round, as U+FFFD.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys((*range(0x80, 0xA0), 0x202D, 0x202E), 0xFFFD)


def visible(text: str) -> str:
    r"""Text that is safe on a terminal.

    >>> visible("a\x1b[31mb")
    'a␛[31mb'
    """
    return text.translate(_VISIBLE)


class AnswerView:
    """Writes chunks to ``output``; ``show_drafts`` colours accepted drafts, where there are colours."""

    def __init__(self, output: TextIO, *, show_drafts: bool = False) -> None:
        console = console_for(output)
        self._output = output
        self._terminal = is_terminal(output)
        self._colours = console.color_system is not None and not console.no_color
        self._show_drafts = show_drafts
        self._thinking = False
        self._last = "\n"

    @property
    def on_terminal(self) -> bool:
        """Whether the answer appears on a terminal as it is generated."""
        return self._terminal

    def legend(self) -> None:
        """Explain the colours, or say that the terminal shows none."""
        if not self._show_drafts:
            return
        if self._colours:
            self._write(f"{_DRAFT}green: accepted draft tokens{_RESET}; the rest: the target's own tokens\n\n")
        else:
            diagnostics().print("No colours here: draft tokens are not highlighted.", style="dim")

    def chunk(self, chunk: Chunk) -> None:
        """Write what one round emitted."""
        # A pipe gets the answer only; on a terminal the thinking shows why it takes so long.
        if chunk.thinking and self._terminal:
            self._thinking = True
            self._write(self._styled(chunk.thinking, _DIM))
        if chunk.text:
            if self._thinking:
                self._write("\n\n" if not self._last.endswith("\n") else "\n")
                self._thinking = False
            self._write(self._answer(chunk))
        self._output.flush()

    def end(self) -> None:
        """End the line, and on a terminal leave one empty."""
        if self._terminal:
            self._write("\n" if self._last.endswith("\n") else "\n\n")
        elif not self._last.endswith("\n"):
            self._write("\n")
        self._output.flush()

    def break_off(self) -> None:
        """End an unfinished line, before an error is shown."""
        if not self._last.endswith("\n"):
            self._write("\n")
            self._output.flush()

    def _answer(self, chunk: Chunk) -> str:
        if not (self._show_drafts and self._colours and chunk.segments):
            return self._styled(chunk.text)
        return "".join(self._styled(piece.text, _DRAFT if piece.is_draft else "") for piece in chunk.segments)

    def _styled(self, text: str, style: str = "") -> str:
        # Files and pipes get the text unchanged.
        text = visible(text) if self._terminal else text
        return f"{style}{text}{_RESET}" if style and text and self._colours else text

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._last = text.removesuffix(_RESET) or self._last
