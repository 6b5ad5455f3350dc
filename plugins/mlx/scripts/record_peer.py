"""Record the Transformers backend's output on the built-in pairs in float32, for tests/test_mlx_peer.py.

    python plugins/mlx/scripts/record_peer.py     # needs polydraft-transformers and polydraft-builtin-pairs

MLX's tests run without torch, so they compare with this record; where both backends are installed the test asks
Transformers itself.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polydraft

FILE = Path(__file__).parent.parent / "tests" / "data" / "transformers_greedy.json"
TARGETS = ("tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama")
PROMPTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "\n".join(
        f"def is_{name}(value):\n    return value == {name!r}\n" for name in ("zero", "one", "two", "three", "many")
    ),
)
"""Shorter than the sliding window of 64 tokens, across it with the output, and past it."""
SETTINGS: dict[str, Any] = {"max_new_tokens": 72, "ignore_eos": True}


def outputs(backend: str, target: str) -> list[dict[str, Any]]:
    """Prompt tokens, output and counts of one backend, one entry per prompt."""
    found = []
    with polydraft.load(f"builtin:{target}", backend=backend, dtype="float32", device="cpu") as session:
        for prompt in PROMPTS:
            result = session.generate(prompt, **SETTINGS)
            found.append(
                {
                    "prompt_token_ids": list(result.prompt_token_ids),
                    "token_ids": list(result.token_ids),
                    "drafted": result.stats.num_draft_tokens,
                    "accepted": result.stats.num_accepted_tokens,
                }
            )
    return found


def main() -> None:
    """Write the file."""
    record = {
        "recorded_with": {name: version(name) for name in ("transformers", "torch")},
        "outputs": {target: outputs("transformers", target) for target in TARGETS},
    }
    FILE.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
