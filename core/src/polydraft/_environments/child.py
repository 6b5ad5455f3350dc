"""What runs in an environment at the end of its installation: ``python -m polydraft._environments.child``.

The request on stdin is JSON, and so is the answer, the rest of the line after ``ANSWER``: engines print to stdout, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

__all__ = ["ANSWER", "main"]

ANSWER = "polydraft-answer: "
"""What the line of the answer begins with."""
_PROMPT = "def main():\n    "
_TOKENS = 24


def main() -> None:
    """Answer ``{"backend": ..., "target": ..., "dtype": ...}``: what a greedy self-test gave."""
    answer = _self_test(json.load(sys.stdin))
    print(f"\n{ANSWER}{json.dumps(answer)}", flush=True)
    os._exit(0)  # without the engine's own clean-up, which may hang


def _self_test(request: dict[str, str]) -> dict[str, Any]:
    """Decode greedily, with speculation and plainly."""
    import polydraft
    from polydraft.contract.results import compared

    began = time.monotonic()
    with polydraft.load(request["target"], backend=request["backend"], dtype=request["dtype"]) as session:
        found = [
            session.generate(_PROMPT, max_new_tokens=_TOKENS, temperature=0.0, speculate=speculate, ignore_eos=True)
            for speculate in ("on", "off")
        ]
        speculative, plain = compared(*found)
        return {
            "tokens": [speculative, plain],
            "acceptance_rate": found[0].stats.acceptance_rate,
            "device": session.running.device,
            "seconds": time.monotonic() - began,
        }


if __name__ == "__main__":
    main()
