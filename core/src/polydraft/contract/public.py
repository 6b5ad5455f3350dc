"""What plugins may import. Everything else of polydraft is private, and may change without a word."""

from __future__ import annotations

__all__ = ["PUBLIC_MODULES"]

PUBLIC_MODULES = {
    "polydraft": "the records, the hook marker, Session, errors: what most plugins need",
    "polydraft.contract": "the interfaces of engines, requests and results",
    "polydraft.errors": "all errors",
    "polydraft.hardware": "the processor, and what dtype='auto' means on it",
    "polydraft.reasons": "why speculation is off, in the words that every backend uses",
    "polydraft.session": "Session and Generation, for whole engines",
    "polydraft.sampling.ops": "ArrayOps: what an array library must offer for tokens to be chosen in it",
    "polydraft.sampling.numpy_ops": "ArrayOps on numpy",
    "polydraft.text.hub_tokenizer": "a tokenizer of Transformers as polydraft's",
    "polydraft.checkpoints.config": "reading a checkpoint's config.json",
    "polydraft.checkpoints.fetch": "a resolved model's files, downloaded if need be",
    "polydraft.checkpoints.safetensors": "headers and shards of safetensors files",
    "polydraft.checkpoints.gguf": "the header of a GGUF file, without its weights",
    "polydraft.checkpoints.gguf_config": "a GGUF header in the words of config.json",
    "polydraft.checkpoints.gguf_files": "a resolved GGUF model's files, downloaded if need be",
    "polydraft.checkpoints.compatibility": "whether target and drafter fit, for files that are there after a download",
    "polydraft_conformance.testing": "the conformance suite in one's own tests",
}
"""Module -> what it is for. The names in its ``__all__`` are public; CONTRIBUTING says when they may change."""
