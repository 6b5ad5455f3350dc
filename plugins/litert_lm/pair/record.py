"""Record what Transformers generates for the built-in prompts, for ``tests/expected.json``.

    python plugins/litert_lm/pair/record.py

It needs polydraft with the plugin for Transformers and the built-in pairs. Plain decoding in float32 is recorded.
"""

from __future__ import annotations

import json
from pathlib import Path

import polydraft
import polydraft_builtin_pairs as builtin

OUTPUT = Path(__file__).parents[1] / "tests/expected.json"
MOST_PROMPTS, LONGEST_PROMPT, NEW_TOKENS = 16, 600, 48


def main() -> None:
    """Write the file."""
    found = []
    arguments = {"backend": "transformers", "dtype": "float32", "device": "cpu", "drafter": None}
    with polydraft.load("builtin:tiny-e2b", **arguments) as session:
        for prompt in builtin.prompts():
            given = prompt.text if prompt.text is not None else [dict(message) for message in prompt.messages]
            result = session.generate(given, max_new_tokens=NEW_TOKENS)
            if len(result.prompt_token_ids) > LONGEST_PROMPT:
                continue
            found.append(
                {
                    "prompt": given,
                    "max_new_tokens": NEW_TOKENS,
                    "prompt_token_ids": result.prompt_token_ids,
                    "token_ids": result.token_ids,
                }
            )
    OUTPUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in found[:MOST_PROMPTS]) + "\n]\n", "utf-8")


if __name__ == "__main__":
    main()
