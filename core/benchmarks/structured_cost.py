"""What `guided` costs a token: choosing with masks against choosing without, for a vocabulary of 262,144 tokens.

    python core/benchmarks/structured_cost.py [--save]

Both sides choose from the same logits, k+1 rows a round, along a text that the grammar allows; on the guided side the
masks are made as well, once for each row, and drafts are taken back in every second round. A step of the smallest head
with this vocabulary, a product of k+1 rows of 256 numbers, is timed next to them: `share_of_a_step` is what is added,
over that product and plain choosing together. A real model's step takes longer.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from polydraft.contract import GenerationSettings, Guided, TokenRequest
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.structured import Grammars

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))

from benchmarks import Recorder, parser

VOCABULARY, HIDDEN, K = 262_144, 256, 4
END = 256
SCHEMAS: dict[str, Any] = {
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "any object": {"type": "object"},
}
TEXTS = {
    "record": {"name": "Ada Lovelace of London", "age": 36, "tags": ["red", "green", "blue"]},
    "any object": {"a long key of some words": ["text " * 8, 1.5, {"inner": None}], "b": True},
}


class Words:
    """Every byte, an end, and made-up words with and without a space before them."""

    vocab_size = VOCABULARY
    bos_token_id = None
    eos_token_ids = special_token_ids = frozenset({END})

    def __init__(self) -> None:
        draw = random.Random(0)
        words: set[bytes] = set()
        letters = "etaoinshrdlucmfwypvbgkqjxz"
        while len(words) < VOCABULARY - 257:
            word = "".join(draw.choice(letters[: draw.randrange(4, 27)]) for _ in range(draw.randrange(2, 9)))
            words.add(
                (" " if draw.random() < 0.5 else "").encode() + (word.title() if draw.random() < 0.2 else word).encode()
            )
        self.spellings = [bytes([byte]) for byte in range(256)] + [b"<end>"] + sorted(words)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's text."""
        return self.spellings[token_id]

    def token_id(self, token: str) -> int | None:
        """None: no token has a role in chats."""
        return None

    def encode(self, text: str) -> list[int]:
        """Byte by byte."""
        return list(text.encode())


def sampler(grammars: Grammars | None, guided: Guided, temperature: float) -> RuleSampler:
    """A generation's sampler; without ``grammars`` a plain one."""
    settings = GenerationSettings(temperature=temperature, guided=guided if grammars else None)
    request = TokenRequest(
        prompt_token_ids=(0,),
        settings=settings,
        seed=1,
        speculate=True,
        num_speculative_tokens=K,
        eos_token_ids=frozenset({END}),
        max_total_tokens=4096,
    )
    return RuleSampler(NumpyOps(), request, "float32", VOCABULARY, grammars.run(request) if grammars else None)


def choosing(one: RuleSampler, text: list[int], logits: np.ndarray[Any, Any]) -> list[float]:
    """Seconds of each round along a text; every second round rejects its drafts."""
    seconds, at, rejects = [], 0, False
    tokens = [0, *text]
    while at + K + 1 < len(tokens):
        run = tokens[at : at + K + 1]
        began = time.perf_counter()
        one.choose(logits, at + 1, run)
        seconds.append(time.perf_counter() - began)
        at += 1 if rejects else K
        rejects = not rejects
    return seconds


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7)
    given = options.parse_args()
    constants = {"vocabulary": VOCABULARY, "hidden": HIDDEN, "k": K}
    recorder = Recorder(__file__, __doc__, given, packages=["numpy", "llguidance"], constants=constants)
    words = Words()
    began = time.perf_counter()
    grammars = Grammars(words)  # type: ignore[arg-type]
    grammars.check(Guided(kind="regex", text="a"))
    recorder.row({"case": "vocabulary"}, {"seconds": round(time.perf_counter() - began, 2)})
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (K + 1, VOCABULARY)).astype(np.float32)
    head = draw.normal(0, 1, (HIDDEN, VOCABULARY)).astype(np.float32)
    rows = draw.normal(0, 1, (K + 1, HIDDEN)).astype(np.float32)
    product = []
    for _ in range(given.repeats):
        began = time.perf_counter()
        _ = rows @ head
        product.append(time.perf_counter() - began)
    step = statistics.median(product)
    for name, schema in SCHEMAS.items():
        guided = Guided(kind="json", text=json.dumps(schema))
        text = list(json.dumps(TEXTS[name]).encode())
        for temperature in (0.0, 0.8):
            sides: dict[str, list[float]] = {"plain": [], "guided": []}
            for _ in range(given.repeats):
                sides["plain"] += choosing(sampler(None, guided, temperature), text, logits)
                sides["guided"] += choosing(sampler(grammars, guided, temperature), text, logits)
            plain, with_masks = (statistics.median(seconds) for seconds in sides.values())
            values = {
                "plain_microseconds_per_row": round(plain / (K + 1) * 1e6, 1),
                "guided_microseconds_per_row": round(with_masks / (K + 1) * 1e6, 1),
                "step_milliseconds": round(step * 1e3, 2),
                "share_of_a_step": round((with_masks - plain) / (step + plain), 4),
            }
            recorder.row({"schema": name, "temperature": temperature}, values)


if __name__ == "__main__":
    main()
