"""`python -m training STEP`: corpus, train, package, score, card (see README.md)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from .architectures import PAIRS


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    corpus, out = Path(".corpus"), Path(".trained")
    parser.add_argument("--corpus", type=Path, default=corpus, help="folder for the tokenizer and the token arrays")
    parser.add_argument("--out", type=Path, default=out, help="folder for the trained checkpoints")
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("corpus", help="make the tokenizer and the token arrays from the standard library")
    train = steps.add_parser("train", help="train pairs, one process per pair")
    train.add_argument("names", nargs="*", default=list(PAIRS), help="targets (default: all)")
    train.add_argument("--device", default="cuda")
    train.add_argument("--plan", type=json.loads, default={}, help="fields of pairs.Plan as JSON")
    train.add_argument("--here", action="store_true", help="train in this process, one pair after the other")
    score = steps.add_parser("score", help="measure acceptance on the shipped prompts")
    score.add_argument("--new-tokens", type=int, default=96)
    score.add_argument("--device", default="cpu")
    score.add_argument("--threads", type=int, default=1)
    steps.add_parser("prompts", help="write the package's prompts")
    steps.add_parser("card", help="write the scores into MODEL_CARD.md and the samples into training/README.md")
    steps.add_parser("package", help="copy the checkpoints into the package and write the checksums")
    return parser.parse_args()


def train_in_processes(arguments: argparse.Namespace) -> int:
    """Train in one process per pair, all on the same device."""
    base = [sys.executable, "-m", "training", "--corpus", str(arguments.corpus), "--out", str(arguments.out), "train"]
    options = ["--device", arguments.device, "--plan", json.dumps(arguments.plan), "--here"]
    running = {name: subprocess.Popen([*base, name, *options]) for name in arguments.names}
    codes = {name: process.wait() for name, process in running.items()}
    print({name: code for name, code in codes.items() if code} or "all pairs trained")
    return max(codes.values())


def main() -> int:
    """Run one step; heavy modules are imported where they are needed."""
    arguments = parse()
    if arguments.step == "corpus":
        from .corpus import build

        print(json.dumps(build(arguments.corpus), indent=2))
    elif arguments.step == "train":
        if not arguments.here:
            return train_in_processes(arguments)
        from .pairs import Plan, train_pair

        for name in arguments.names:
            train_pair(name, arguments.corpus, arguments.out, Plan(**arguments.plan), arguments.device)
    elif arguments.step == "score":
        from .score import score_all

        score_all(new_tokens=arguments.new_tokens, device=arguments.device, threads=arguments.threads)
    elif arguments.step == "prompts":
        from .package import write_prompts

        write_prompts(arguments.corpus)
    elif arguments.step == "card":
        from .card import write_card

        write_card()
    elif arguments.step == "package":
        from .package import package

        package(arguments.corpus, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
