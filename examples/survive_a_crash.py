"""An app that survives the end of its engine: ``python examples/survive_a_crash.py [TARGET]``."""

import os
import signal
import sys

import polydraft
from polydraft.errors import EngineCrashedError

PROMPT = "def read_lines(path):\n"


def main(target: str) -> None:
    """Kill the engine's process in the middle of an answer, load it again, and finish the answer."""
    # In this process an abort of the engine would end the app; in a worker it is an error.
    session = polydraft.load(target, isolation="process")
    print(PROMPT, end="")
    try:
        for number, chunk in enumerate(session.stream(PROMPT, max_new_tokens=60, ignore_eos=True)):
            print(chunk.text, end="", flush=True)
            if number == 2 and session.running.process_id is not None:
                os.kill(session.running.process_id, signal.SIGKILL)  # as the system does when memory runs out
    except EngineCrashedError as crash:
        print(f"\n--- {crash.message}")
        session.close()
        session = polydraft.load(target, isolation="process")
        written = crash.partial_text
        rest = session.generate(PROMPT + written, max_new_tokens=30)
        print(f"--- A new one goes on:\n{PROMPT}{written}{rest.text}")
    finally:
        session.close()


main(sys.argv[1] if len(sys.argv) > 1 else "builtin:tiny-e2b")
