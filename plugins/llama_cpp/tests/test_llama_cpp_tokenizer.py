"""The tokenizer in a GGUF file gives the same tokens as the library ``tokenizers``, which Transformers uses.

Its tokens are recorded as checksums, as that library is not in this backend's environment. To record again:
``python test_llama_cpp_tokenizer.py builtin_pairs/src/polydraft_builtin_pairs/data/tiny-e2b/tokenizer.json``
"""

import json
import random
import sys
import zlib
from pathlib import Path

RECORD = Path(__file__).parent / "data/token_digests.json"
_WORDS = """def class return self import from for in range if else while with as lambda yield try except finally raise
the a of to and is that it on was He she They can't won't I'm you're we've she'd O'Neill 's 'S don\u2019t print(x) x+=1
== != <= >= -> := ** // {} [] () "quoted" 'single' `tick` # TODO: /* */ <!-- --> https://example.org/a?b=c&d=e
user@host.tld 0 1 42 3.14159 1e-10 0xFF 1_000_000 2026-11-24 12:30:59 $9.99 50% ½ Ⅷ ① Straße naïve café
ÅNGSTRÖM ﬁligree ǅ""".split()  # noqa: SIM905 - one word per line would be long
_RANGES = [
    (0x20, 0x7E),
    (0xA0, 0x17F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x590, 0x5FF),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x300, 0x36F),
    (0x1100, 0x11FF),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x2000, 0x206F),
    (0x20A0, 0x20CF),
    (0x2190, 0x22FF),
    (0x1F300, 0x1F64F),
    (0x1F900, 0x1F9FF),
    (0x10400, 0x1044F),
    (0xFE00, 0xFE0F),
]
_SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "\n    ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\v",
    "\f",
]
_SPECIAL = [
    "<bos>",
    "<eos>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    '<|"|>',
    "<unk>",
    "<pad>",
]
_PIECES = [
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "e\u0301",
    "\ufeff",
    "\x01",
    "\x7f",
    "<|",
    "|>",
    "<bo",
    "s>",
    "'",
    "\u2019s",
    "'ll",
    "''",
    "...",
    "…",
]


def _unicode(choose):
    first, last = choose.choice(_RANGES)
    return "".join(chr(choose.randint(first, last)) for _ in range(choose.randint(1, 8)))


def texts():
    """The texts, the same at every call."""
    choose = random.Random(20261124)
    found = ["a", " ", "\n", "<bos>", "<bos><bos>", "\x00a", "é", "👍"]
    while len(found) < 1000:
        kinds = choose.choices(
            [
                lambda: choose.choice(_WORDS),
                lambda: _unicode(choose),
                lambda: choose.choice(_SPACES),
                lambda: choose.choice(_SPECIAL),
                lambda: choose.choice(_PIECES),
                lambda: str(choose.randint(0, 10 ** choose.randint(1, 18))),
            ],
            weights=[10, 4, 3, 1, 2, 2],
            k=choose.randint(1, 40),
        )
        glue = choose.choice(["", " ", " ", "  "])
        found.append(glue.join(kind() for kind in kinds))
    return found


def digest(token_ids):
    return zlib.crc32(" ".join(map(str, token_ids)).encode())


def test_a_thousand_texts(gguf):
    import polydraft

    recorded = json.loads(RECORD.read_text())
    assert len(recorded) == len(texts()) == 1000
    with polydraft.load(gguf("tiny-e2b"), backend="llama_cpp", drafter=None) as session:
        tokenizer = session.tokenizer
        for text, wanted in zip(texts(), recorded, strict=True):
            token_ids = tokenizer.encode(text)
            assert digest(token_ids) == wanted, f"different tokens for {text!r}"
            assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()


if __name__ == "__main__":
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(sys.argv[1])
    digests = [digest(library.encode(text, add_special_tokens=False).ids) for text in texts()]
    RECORD.write_text(json.dumps(digests) + "\n")
