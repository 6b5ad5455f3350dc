"""Two engines at once answer one prompt, side by side: ``python examples/two_engines.py [ENGINE ENGINE [TARGET]]``.

Without names these are the first two that are installed and run the target; if there is only one, it runs twice.
"""

import sys
import threading
import time
from contextlib import ExitStack

import polydraft
from polydraft.errors import PolydraftError
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

PROMPT = "def read_lines(path):\n"


class Answer(threading.Thread):
    """One engine's answer, which grows in a thread of its own."""

    def __init__(self, session: polydraft.Session) -> None:
        super().__init__()
        self.session, self.text, self.error = session, PROMPT, ""
        self.title = f"{session.running.engine} {session.running.engine_version}, {session.running.process}"

    def run(self) -> None:
        """Stream the answer."""
        try:
            for chunk in self.session.stream(PROMPT, max_new_tokens=60):
                self.text += chunk.text
        except PolydraftError as error:
            self.error = str(error)


def open_two(names: list[str], target: str, closing: ExitStack) -> list[polydraft.Session]:
    """A session for each of two engines."""
    installed = [name for engine in polydraft.engines() if engine.usable for name in engine.backends]
    sessions: list[polydraft.Session] = []
    for name in names or installed:
        try:
            # In this process, or in a worker where two engines in one process would clash.
            sessions.append(closing.enter_context(polydraft.load(target, backend=name)))
        except PolydraftError as error:
            if names:
                raise
            print(f"{name}: {error.message}", file=sys.stderr)
        if len(sessions) == 2:
            return sessions
    return sessions * 2


def main(names: list[str], target: str) -> None:
    """Show both answers while they grow: next to each other in a terminal, else one after the other."""
    console = Console()
    with ExitStack() as closing:
        answers = [Answer(session) for session in open_two(names, target, closing)]
        for answer in answers:
            answer.start()

        def panels() -> Columns:
            width = console.width // 2 - 1
            return Columns([Panel(Text(one.text + one.error), title=one.title, width=width) for one in answers])

        if console.is_terminal:
            with Live(console=console, refresh_per_second=10) as live:
                while any(answer.is_alive() for answer in answers):
                    live.update(panels())
                    time.sleep(0.1)
                live.update(panels())
        for answer in answers:
            answer.join()
            if not console.is_terminal:
                print(f"--- {answer.title}\n{answer.text}{answer.error}")


main(sys.argv[1:3], sys.argv[3] if len(sys.argv) > 3 else "builtin:tiny-e2b")
