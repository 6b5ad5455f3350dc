"""Copy trained checkpoints and prompts into the package, with checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from .architectures import PAIRS
from .checkpoint import load, save
from .corpus import load_tokenizer
from .prompts import build_prompts
from .sources import read_sources

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "polydraft_builtin_pairs"
DATA = PACKAGE / "data"
LIMIT_BYTES = 24_000_000


def write_prompts(corpus: Path) -> None:
    """Writes `prompts.json`."""
    prompts = build_prompts(load_tokenizer(corpus), read_sources()[1])
    text = json.dumps(prompts, indent=1, ensure_ascii=False)
    (PACKAGE / "prompts.json").write_text(text + "\n", encoding="utf-8")


def write_checksums() -> None:
    """Write the SHA-256 of every file in `data` and of the prompts."""
    files = sorted(path for path in DATA.rglob("*") if path.is_file())
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(PACKAGE).as_posix()}"
        for path in (*files, PACKAGE / "prompts.json")
    ]
    (PACKAGE / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size} bytes")
    if size > LIMIT_BYTES:
        raise RuntimeError(f"the checkpoints take {size} bytes, more than {LIMIT_BYTES}")


def package(corpus: Path, trained: Path) -> None:
    """Save each checkpoint again with the installed Transformers, so that all configs have one version."""
    tokenizer = load_tokenizer(corpus)
    records = ROOT / "training" / "records"
    records.mkdir(exist_ok=True)
    for name, drafter in PAIRS.items():
        for folder in (name, drafter):
            save(load(trained / folder), DATA / folder, tokenizer)
        shutil.copyfile(trained / f"{name}.json", records / f"{name}.json")
    shutil.copyfile(corpus / "corpus.json", records / "corpus.json")
    write_prompts(corpus)
    write_checksums()
