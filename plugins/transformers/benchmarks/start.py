"""Seconds from a program's start to its first token: ``polydraft generate`` beside the engine alone, on the same files.

    python plugins/transformers/benchmarks/start.py --save

``engine alone`` imports the engine, loads the target and generates a token, and does nothing else: no drafter, no check
of what is loaded. The programs run in turn, after a start of each that does not count: all files are in memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import polydraft_builtin_pairs

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, in_turn, parser

PROMPT = "import os"
ALONE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, device = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).to(device)
given = tokenizer("import os", return_tensors="pt", return_token_type_ids=False).to(device)
print(model.generate(**given, max_new_tokens=1))
"""
"""The engine's own program, which gets the folder and the device."""


def main() -> None:
    """Start each program several times."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=["tiny-e2b"])
    options.add_argument("--device", default="cpu")
    options.add_argument("--repeats", type=int, default=9)
    given = options.parse_args()
    record = Recorder(__file__, __doc__, given, packages=("torch", "transformers"))
    for model in given.models:
        folder = str(polydraft_builtin_pairs.path(model))
        ours = ["-m", "polydraft", "generate", PROMPT, "-m", f"builtin:{model}", "-b", "transformers"]
        commands = {
            "polydraft": [*ours, "--device", given.device, "--max-new-tokens", "1"],
            "engine alone": ["-c", ALONE, folder, given.device],
        }
        found = in_turn({name: lambda own=own: _run(own) for name, own in commands.items()}, given.repeats)
        for name, runs in found.items():
            seconds, processor = ([run[index] for run in runs] for index in (0, 1))
            record.row({"model": model, "program": name}, {}, {"seconds": seconds, "processor_seconds": processor})


def _run(arguments: list[str]) -> tuple[float, float]:
    """Seconds on the clock, and of processor time."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, os.times()
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
