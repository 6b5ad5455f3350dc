"""Speculative decoding beside plain decoding and beside the engine's own loop, on built-in pairs: ``polydraft bench``.

    python core/benchmarks/speculation.py --against upstream --engine-options '{"num_threads": 1}' --save transformers
    python core/benchmarks/speculation.py --models builtin:tiny-e2b -k 1 2 3 4 5 6 7 8 auto --save k_transformers

What the figures mean: docs/bench.md. All sides of a model run in turn. Next to a row for all prompts there is one for
each class of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import polydraft

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
from benchmarks import Recorder, parser


def main() -> None:
    """Measure each model in each dtype."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama"])
    options.add_argument("--backends", nargs="+", default=["transformers"])
    options.add_argument("--dtypes", nargs="+", default=["float32"])
    options.add_argument("-k", nargs="+", default=["4"], help="numbers, or auto")
    options.add_argument("--against", choices=["upstream"])
    options.add_argument("--device", default="cpu")
    options.add_argument("--engine-options", default="{}", metavar="JSON")
    options.add_argument("--max-new-tokens", type=int, default=96)
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    record: Recorder | None = None
    for model, dtype in ((model, dtype) for model in given.models for dtype in given.dtypes):
        found = polydraft.bench(
            f"builtin:{model}",
            backends=given.backends,
            num_speculative_tokens=[k if k == "auto" else int(k) for k in given.k],
            against=given.against,
            dtype=dtype,
            device=given.device,
            engine_options=json.loads(given.engine_options),
            max_new_tokens=given.max_new_tokens,
            ignore_eos=True,
            repeats=given.repeats,
            progress=lambda said: print(said, file=sys.stderr),
        )
        record = record or _recorder(given, found)
        for row in found.rows:
            if row.state != "measured":
                raise SystemExit(f"{row.label}: {row.state}: {row.reason}")
            whose = "upstream" if row.upstream else row.backend
            case = {"model": model, "dtype": dtype, "side": whose, "k": row.num_speculative_tokens}
            record.row({**case, "prompts": "all"}, _figures(row), {"tokens_per_second": row.runs})
            for name, figures in row.by_class.items():
                record.row({**case, "prompts": name}, {what: round(value, 3) for what, value in figures.items()})


def _recorder(given: argparse.Namespace, found: polydraft.BenchResult) -> Recorder:
    versions = {name: version.split()[0] for row in found.rows for name, version in row.versions.items()}
    accelerator = None if given.device == "cpu" else found.rows[0].hardware
    threads = next((value for name, value in json.loads(given.engine_options).items() if "threads" in name), None)
    return Recorder(__file__, __doc__, given, accelerator=accelerator, threads=threads, versions=versions)


def _figures(row: polydraft.BenchRow) -> dict[str, Any]:
    figures = {
        "times_plain": row.times_plain,
        "times_upstream": row.times_upstream,
        "milliseconds_a_round": row.round_ms and row.round_ms.total,
        "mean_acceptance_length": row.mean_acceptance_length,
        "milliseconds_to_first_token": row.first_token_seconds and 1e3 * row.first_token_seconds,
    }
    rounded = {name: None if value is None else round(value, 3) for name, value in figures.items()}
    return {**rounded, "same_as_plain": row.same_as_plain, "upstream": row.upstream or ""}


if __name__ == "__main__":
    main()
