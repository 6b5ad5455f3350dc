"""Answers that a program can read: a JSON schema decides which tokens may come, with drafts as without.

It needs llguidance: `pip install './core[structured]'` in a clone; all.txt has it.
"""

import json

import polydraft

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["function", "class", "other"]},
        "name": {"type": "string", "maxLength": 20},
        "lines": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["kind", "name", "lines"],
    "additionalProperties": False,
}

with polydraft.load("builtin:tiny-e2b") as session:
    result = session.generate(
        "def add(self, item):\n", guided={"json": SCHEMA}, max_new_tokens=120, temperature=0.7, seed=1
    )
    if result.matches:  # False: cut by max_new_tokens, a stop or the context
        print(json.loads(result.text))
    print(f"{result.finish_reason}, acceptance {result.stats.acceptance_rate}")

    answer = session.generate("Is this Python? ", guided={"choice": ["yes", "no"]})
    print(answer.text)
