"""Records the logits of the built-in pairs with the Transformers backend, on the CPU, in float32.

Run it where the Transformers backend is installed, whenever the pairs have been retrained:
``python conformance/scripts/record_logits.py``. With ``--far`` only the long contexts are recorded again.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polydraft import Session
from polydraft.contract import SteppingEngine
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.options import SuiteOptions
from polydraft_conformance.prompts import PromptText, chats, texts
from polydraft_conformance.reference_logits import FILE, best, key_of, rows_of
from polydraft_conformance.streams import streamed
from polydraft_conformance.suite import Suite, open_suite

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "polydraft_conformance" / FILE
DRAFTS = 3
FAR, FAR_TOKENS, FAR_K = 400, 64, 4
"""Tokens of the long context, of the output after it, and drafted in each of its rounds."""
PROMPTS: tuple[Any, ...] = (
    *(text[:120] for text in texts(0)),
    "<bos>Once is enough.",
    "Größe: 5 € 🎉\t\r\n",
    *([{"role": "user", "content": chat}] for chat in chats(0)[:2]),
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}],
)


def far_records(suite: Suite) -> dict[str, Any]:
    """One long context for each target and drafter, and the accepted drafts of the rounds after it."""
    found: dict[str, Any] = {}
    for pair in suite.pairs:
        for kind in pair.kinds:
            if kind == "ngram":
                continue
            case = pair.case(FAR_K, kind)
            session = suite.session(case)
            context = PromptText.of(session, 0).tokens(FAR, variant=2)
            output = streamed(session, context, **greedy_settings(FAR_TOKENS))
            far = {"output": list(output.token_ids), "accepted": [one.accepted for one in output.rounds]}
            found[key_of(case)] = {**record_of(session, context), "far": {"k": FAR_K, **far}}
    return found


def record_of(session: Session, context: list[int]) -> dict[str, Any]:
    """The logits after a context."""
    assert isinstance(session.engine, SteppingEngine)
    rows = rows_of(session.engine, context, DRAFTS)
    assert rows.drafter is not None
    return {
        "context": context,
        "target": best(rows.target),
        "drafts": list(rows.drafts),
        "drafter": [best(row) for row in rows.drafter],
    }


def main(backend: str, what: str = "--all") -> None:
    """Write the file."""
    suite = open_suite(SuiteOptions(backend=backend))
    if what == "--far":
        recorded = json.loads(OUTPUT.read_text(encoding="utf-8"))
        for key, record in far_records(suite).items():
            recorded["pairs"][key] = [one for one in recorded["pairs"][key] if "far" not in one] + [record]
        suite.close()
        write(recorded)
        return
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
                records.append(record_of(session, context))
    for key, record in far_records(suite).items():
        pairs[key].append(record)
    suite.close()
    made_with = {name: version(name) for name in ("polydraft-builtin-pairs", "torch", "transformers")}
    write({"dtype": "float32", "device": "cpu", "made_with": made_with, "prompts": prompts, "pairs": pairs})


def write(data: dict[str, Any]) -> None:
    """One record a line."""
    text = json.dumps(data).replace('{"context"', '\n{"context"').replace('{"prompt":', '\n{"prompt":')
    OUTPUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["transformers"]))
