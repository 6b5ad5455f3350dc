"""Two answers at once in an app with an event loop: ``python examples/async_app.py [TARGET]``."""

import asyncio
import sys

import polydraft


async def answer(session: polydraft.Session, prompt: str) -> str:
    """Stream one answer; leaving the loop early would cancel it."""
    text = ""
    async for chunk in session.astream(prompt, max_new_tokens=40):
        text += chunk.text
    return prompt + text


async def main(target: str) -> None:
    """Load outside the event loop, then let two prompts be answered."""
    with await asyncio.to_thread(polydraft.load, target) as session:
        for text in await asyncio.gather(
            answer(session, "class Reader:\n    def __init__(self, file):\n"), answer(session, "import os\n")
        ):
            print(text, end="\n\n")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "builtin:tiny-e2b"))
