"""The corpus as token arrays: whole modules, single functions, and chats, mixed in a fixed order."""

from __future__ import annotations

import hashlib
import json
import platform
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .chats import chats
from .sources import Described, described, read_sources
from .tokenizer import BOS, EOS, STOP_IDS, VOCAB_SIZE, ChatTemplate, train_tokenizer

SEED = 20261
CHAT_SHARE = 0.18
FUNCTION_SHARE = 0.10
MAX_FUNCTION_BYTES = 1500
TOKENIZER_FILE = "tokenizer.json"
TOKENS_FILE = "tokens.npz"


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a document without a leading `<bos>`; special tokens in the text are recognised."""
    return tokenizer.encode(text.removeprefix("<bos>"), add_special_tokens=False).ids


def take(documents: list[list[int]], budget: int) -> list[list[int]]:
    """Documents from the front until the budget of tokens is spent."""
    taken: list[list[int]] = []
    for document in documents:
        if budget <= 0:
            break
        taken.append(document)
        budget -= len(document)
    return taken


def build(folder: Path) -> dict[str, object]:
    """Build tokenizer and token arrays in `folder`; return counts and checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    train, held = read_sources()
    items: list[Described] = [item for source in train for item in described(source)]
    rng.shuffle(items)
    chat_texts = list(chats(items, ChatTemplate(), seed=SEED))
    tokenizer = train_tokenizer([*(source.text for source in train), *chat_texts[:4000]])
    tokenizer.save(str(folder / TOKENIZER_FILE))

    modules = [encode(tokenizer, source.text) for source in train]
    chat_ids = [encode(tokenizer, text) for text in chat_texts]
    functions = [encode(tokenizer, item.code) for item in items if len(item.code) <= MAX_FUNCTION_BYTES]
    total = sum(map(len, modules)) / (1 - CHAT_SHARE - FUNCTION_SHARE)
    # One chat per item may fall short of the share: add chats with other questions about the same items.
    repeats = 1
    while sum(map(len, chat_ids)) < CHAT_SHARE * total and repeats < 4:
        chat_ids += [encode(tokenizer, text) for text in chats(items, ChatTemplate(), seed=SEED + repeats)]
        repeats += 1
    chat_ids = take(chat_ids, int(CHAT_SHARE * total))
    functions = take(functions, int(FUNCTION_SHARE * total))
    documents = [*modules, *chat_ids, *functions]
    rng.shuffle(documents)
    stream = np.array([token for document in documents for token in (BOS, *document, EOS)], dtype=np.uint16)
    scoring = np.array(
        [token for source in held for token in (BOS, *encode(tokenizer, source.text), EOS)], dtype=np.uint16
    )
    np.savez_compressed(folder / TOKENS_FILE, train=stream, held_out=scoring)
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "seed": SEED,
        "vocab_size": VOCAB_SIZE,
        "stop_ids": list(STOP_IDS),
        "modules": len(train),
        "module_tokens": sum(map(len, modules)),
        "chats": len(chat_ids),
        "chat_tokens": sum(map(len, chat_ids)),
        "functions": len(functions),
        "function_tokens": sum(map(len, functions)),
        "train_tokens": int(stream.size),
        "held_out_tokens": int(scoring.size),
        "bytes_per_token": round(sum(len(s.text.encode()) for s in train) / sum(map(len, modules)), 3),
        "train_sha256": hashlib.sha256(stream.tobytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((folder / TOKENIZER_FILE).read_bytes()).hexdigest(),
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def load_tokens(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training stream and the held-out stream."""
    with np.load(folder / TOKENS_FILE) as arrays:
        return arrays["train"], arrays["held_out"]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the corpus in `folder`."""
    return Tokenizer.from_file(str(folder / TOKENIZER_FILE))
