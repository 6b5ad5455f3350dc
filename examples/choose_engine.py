r"""An app with a menu of engines: ``python examples/choose_engine.py [TARGET]``.

Pick an engine, give a prompt, pick another. It reads a pipe as well:

    printf 'transformers\nimport os\n' | python examples/choose_engine.py
"""

import sys
from contextlib import ExitStack

import polydraft
from polydraft.errors import PolydraftError


def ask(question: str) -> str:
    """A line from the terminal or the pipe; empty at its end."""
    print(question, end=" ", flush=True)
    line = sys.stdin.readline().strip()
    if not sys.stdin.isatty():
        print(line)
    return line


def main(target: str) -> None:
    """Keep each engine that was picked, until the menu is left."""
    menu: list[str] = []
    for engine in polydraft.engines():
        if engine.usable:
            menu += engine.backends
        else:
            print(f"     {engine.name}: {engine.why_not or engine.command}")
    for number, name in enumerate(menu, start=1):
        print(f"{number:3}. {name}")

    sessions: dict[str, polydraft.Session] = {}
    with ExitStack() as closing:
        while name := ask("Engine (number or name, nothing to leave):"):
            if name.isdecimal() and 1 <= int(name) <= len(menu):
                name = menu[int(name) - 1]
            try:
                # The engine is in this process, or in a worker: whichever keeps all of them alive.
                if name not in sessions:
                    sessions[name] = closing.enter_context(polydraft.load(target, backend=name))
                running = sessions[name].running
                print(f"{running.engine} {running.engine_version} in {running.process}: {running.process_reason}")
                prompt = ask("Prompt:")
                for chunk in sessions[name].stream(prompt, max_new_tokens=40):
                    print(chunk.text, end="", flush=True)
                print()
            except PolydraftError as error:  # not installed, or not for this model: pick another
                print(error)


main(sys.argv[1] if len(sys.argv) > 1 else "builtin:tiny-e2b")
