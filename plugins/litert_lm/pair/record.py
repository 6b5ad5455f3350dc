"""Record what Transformers generates for the built-in prompts, for ``tests/expected.json``.

    python plugins/litert_lm/pair/record.py

It needs polydraft with the plugin for Transformers and the built-in pairs. Plain decoding in float32 is recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polydraft
import polydraft_builtin_pairs as builtin

OUTPUT = Path(__file__).parents[1] / "tests/expected.json"
MOST = {"text": 10, "chat": 8}
LONGEST_PROMPT = 320
NEW_TOKENS = {"text": 48, "chat": 96}


def main() -> None:
    """Write the file."""
    found: list[dict[str, Any]] = []
    arguments = {"backend": "transformers", "dtype": "float32", "device": "cpu", "drafter": None}
    with polydraft.load("builtin:tiny-e2b", **arguments) as session:
        for prompt in builtin.prompts():
            if sum(one["kind"] == prompt.kind for one in found) == MOST[prompt.kind] or prompt.tools:
                continue
            given = prompt.text if prompt.text is not None else [dict(message) for message in prompt.messages]
            result = session.generate(given, max_new_tokens=NEW_TOKENS[prompt.kind])
            if len(result.prompt_token_ids) > LONGEST_PROMPT:
                continue
            found.append(
                {
                    "kind": prompt.kind,
                    "prompt": given,
                    "max_new_tokens": NEW_TOKENS[prompt.kind],
                    "prompt_token_ids": result.prompt_token_ids,
                    "token_ids": result.token_ids,
                }
            )
    OUTPUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in found) + "\n]\n", "utf-8")


if __name__ == "__main__":
    main()
