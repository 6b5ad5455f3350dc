"""Stream a chat answer, accepted draft tokens in brackets: ``python examples/stream.py [TARGET]``."""

import sys

import polydraft

target = sys.argv[1] if len(sys.argv) > 1 else "builtin:tiny-e2b"
messages = [{"role": "user", "content": "What does the bisect module do?"}]

with polydraft.load(target) as session:
    for chunk in session.stream(messages, max_new_tokens=60, temperature=0.7, seed=1):
        for piece in chunk.segments:
            print(f"[{piece.text}]" if piece.is_draft else piece.text, end="", flush=True)
    print()
