"""``polydraft-gguf convert FOLDER FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from polydraft.errors import PolydraftError

from polydraft_gguf.conversion.write import TYPES, convert

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="polydraft-gguf", description="GGUF files for llama.cpp.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    writing = commands.add_parser(
        "convert",
        help="write a checkpoint as a GGUF file",
        description="Write a Gemma 4 or Llama checkpoint with a byte-level BPE tokenizer, or a Gemma 4 assistant, as "
        "GGUF. A drafter that is named mtp-<target>.gguf and lies next to its target is found there.",
    )
    writing.add_argument("folder", type=Path, help="the checkpoint: config.json, tokenizer.json, *.safetensors")
    writing.add_argument("file", type=Path, help="the GGUF file to write")
    writing.add_argument("--type", choices=TYPES, default="f32", help="type of the weights (default: f32)")
    given = parser.parse_args(arguments)
    try:
        if not given.folder.is_dir():
            parser.error(f"{given.folder} is not a folder")
        convert(given.folder, given.file, given.type)
    except PolydraftError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{given.file} cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
