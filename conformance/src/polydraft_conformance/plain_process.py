"""A user's program: it loads a pair, generates, and writes down what came out. It knows nothing of the suite.

``disguise.py`` copies this file to where the name of the suite is not in its path, and runs the copy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(load: dict[str, Any], requests: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Load and generate.

    Args:
        load: Arguments of ``polydraft.load``.
        requests: Arguments of ``Session.generate``, one output each.
        more: Further arguments of ``polydraft.load``, which are not JSON.
    """
    import polydraft

    outputs = []
    with polydraft.load(**load, **more) as session:
        session.spells_ids = True  # as the suite
        for request in requests:
            result = session.generate(**request)
            stats = result.stats
            outputs.append(
                {
                    "token_ids": list(result.token_ids),
                    "drafted": stats.num_draft_tokens,
                    "accepted": stats.num_accepted_tokens,
                }
            )
    return outputs


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(main(**asked)), encoding="utf-8")
