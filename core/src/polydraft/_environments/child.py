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
    """Answer ``{"want": "contents", "distributions": [...]}`` or ``{"want": "self-test", "backend", "target"}``."""
    request = json.load(sys.stdin)
    answer = _contents(request) if request["want"] == "contents" else _self_test(request)
    print(f"\n{ANSWER}{json.dumps(answer)}", flush=True)
    os._exit(0)  # without the engine's own clean-up, which may hang


def _contents(request: dict[str, Any]) -> dict[str, Any]:
    """The distributions in this environment, and paths that are there as long as some of them are."""
    from importlib.metadata import PackageNotFoundError, distribution, distributions
    from pathlib import Path

    from packaging.utils import canonicalize_name

    versions: dict[str, str] = {}
    for found in distributions():
        name = found.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), found.version)
    proofs = []
    for name in request["distributions"]:
        try:
            proofs.append(str(distribution(name).locate_file("")))
            proofs += [str(path) for path in [getattr(distribution(name), "_path", None)] if isinstance(path, Path)]
        except PackageNotFoundError:
            continue
    return {"versions": versions, "proofs": sorted({*proofs})}


def _self_test(request: dict[str, Any]) -> dict[str, Any]:
    """Decode greedily, with speculation and plainly."""
    import polydraft

    began = time.monotonic()
    with polydraft.load(request["target"], backend=request["backend"], dtype=request["dtype"]) as session:
        found = [
            session.generate(_PROMPT, max_new_tokens=_TOKENS, temperature=0.0, speculate=speculate, ignore_eos=True)
            for speculate in ("on", "off")
        ]
        speculative, plain = found
        return {
            "tokens": [list(speculative.token_ids), list(plain.token_ids)],
            "acceptance_rate": speculative.stats.acceptance_rate,
            "device": session.running.device,
            "seconds": time.monotonic() - began,
        }


if __name__ == "__main__":
    main()
