"""Run a command, and draw what it shows at a terminal: ``python ci/picture.py FILE.svg TITLE COMMAND ...``.

`nox -s picture` draws the README's with it. The picture has no fonts of its own and asks no server for one.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

WIDTH = 92
"""In characters."""
_PROGRESS = re.compile(r"^.* \.\.\. \d+:\d\d\n", re.MULTILINE)
"""Lines that a slow machine shows while one waits."""
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def drawn(output: str, title: str) -> str:
    """The SVG of a terminal that shows an output with its colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(_PROGRESS.sub("", output).rstrip()))
    found = console.export_svg(title=title, unique_id="demo")
    return "".join(f"{line.rstrip()}\n" for line in _FONTS.sub("", found).splitlines())


def main(file: str, title: str, *command: str) -> int:
    """Write the picture; the exit code is the command's."""
    variables = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode == 0:
        Path(file).write_text(drawn(done.stdout, title), encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
