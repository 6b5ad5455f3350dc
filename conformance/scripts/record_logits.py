"""Records the logits of the built-in pairs with the Transformers backend, on the CPU, in float32.

Run it where the Transformers backend is installed, whenever the pairs have been retrained:
``python conformance/scripts/record_logits.py``.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polydraft.contract import SteppingEngine
from polydraft_conformance.options import SuiteOptions
from polydraft_conformance.prompts import PromptText, chats, texts
from polydraft_conformance.reference_logits import FILE, best, key_of, rows_of
from polydraft_conformance.suite import open_suite

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "polydraft_conformance" / FILE
DRAFTS = 3
PROMPTS: tuple[Any, ...] = (
    *(text[:120] for text in texts(0)),
    "<bos>Once is enough.",
    "Größe: 5 € 🎉\t\r\n",
    *([{"role": "user", "content": chat}] for chat in chats(0)[:2]),
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}],
)


def main(backend: str) -> None:
    """Write the file."""
    suite = open_suite(SuiteOptions(backend=backend))
    pairs: dict[str, Any] = {}
    prompts: dict[str, Any] = {}
    for pair in suite.pairs:
        session = suite.session(pair.case(DRAFTS))
        prompts[pair.target] = [
            {"prompt": prompt, "token_ids": list(session.generate(prompt, max_new_tokens=1).prompt_token_ids)}
            for prompt in PROMPTS
        ]
        for kind in pair.kinds:
            if kind == "ngram":
                continue
            case = pair.case(DRAFTS, kind)
            session = suite.session(case)
            text, window = PromptText.of(session, 0), pair.window
            records = pairs.setdefault(key_of(case), [])
            for length in (window // 2, window - 1, window + 9, 2 * window + 21):
                context = text.tokens(length)
                assert isinstance(session.engine, SteppingEngine)
                rows = rows_of(session.engine, context, DRAFTS)
                assert rows.drafter is not None
                records.append(
                    {
                        "context": context,
                        "target": best(rows.target),
                        "drafts": list(rows.drafts),
                        "drafter": [best(row) for row in rows.drafter],
                    }
                )
    suite.close()
    made_with = {name: version(name) for name in ("polydraft-builtin-pairs", "torch", "transformers")}
    data = json.dumps({"dtype": "float32", "device": "cpu", "made_with": made_with, "prompts": prompts, "pairs": pairs})
    OUTPUT.write_text(
        data.replace('{"context"', '\n{"context"').replace('{"prompt":', '\n{"prompt":') + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["transformers"]))
