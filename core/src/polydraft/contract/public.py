"""The public modules: what apps and plugins may import."""

from __future__ import annotations

__all__ = ["PUBLIC_MODULES"]

PUBLIC_MODULES = {
    "polydraft": "what apps use: load, Session, results",
    "polydraft.contract": "what plugins build on: records, hooks, the interfaces of engines, requests and results",
    "polydraft.errors": "all errors",
    "polydraft.files": "reading files safely; what the system refuses, as typed errors",
    "polydraft.engine_parts": "what several engines need: the context's length",
    "polydraft.engine_parts.memory": "what a pair takes on its device: said before it is loaded, refused if too much",
    "polydraft.engine_parts.draft_model": "a draft model as a second sequence: drafting for any stepping engine",
    "polydraft.engine_parts.http_client": "a client of an engine's server: each answer has a deadline and a size limit",
    "polydraft.engine_parts.server_options": "the options that all servers' backends share: url, key, limits",
    "polydraft.engine_parts.serving": "an engine's server as a child process, which ends with this process",
    "polydraft.caches": "a cache folder: files made once, checked at each use, bounded in size",
    "polydraft.secrets": "API keys and tokens: never shown, stored or put on a command line",
    "polydraft.hardware": "the processor, and what `dtype='auto'` means on it",
    "polydraft.reasons": "why speculation is off, in the words that every backend uses",
    "polydraft.sampling.noise": "the definition of the noise that samples are drawn with",
    "polydraft.sampling.rule": "the definition of how a token is chosen from logits",
    "polydraft.sampling.on_device": "choosing tokens in a step that an engine has recorded, without asking the host",
    "polydraft.sampling.structured": "whether llguidance can read what an output must match, for engines that run it",
    "polydraft.sampling.numpy_ops": "ArrayOps and LogitsHandle on numpy",
    "polydraft.text.hub_tokenizer": "a tokenizer of Transformers as polydraft's",
    "polydraft.text.prompt_format": "how prompts begin, end and are laid out, for a tokenizer of any kind",
    "polydraft.text.ids_only": "a stand-in for models without a tokenizer: token ids in, token ids out",
    "polydraft.text.text_only": "a stand-in for engines that take and give text alone",
    "polydraft.checkpoints.config": "reading a checkpoint's config.json",
    "polydraft.checkpoints.contents": "digests of files, byte for byte; a large file is read once",
    "polydraft.checkpoints.fetch": "a resolved model's files, downloaded if need be",
    "polydraft.checkpoints.special_tokens": "what a checkpoint says about BOS, ends and chat templates",
    "polydraft.checkpoints.safetensors": "headers of safetensors files, and which files of a folder are its weights",
    "polydraft.checkpoints.gguf": "the header of a GGUF file, without its weights",
    "polydraft.checkpoints.gguf_config": "a GGUF header translated to config.json's keys",
    "polydraft.checkpoints.gguf_files": "a resolved GGUF model's files, downloaded if need be",
    "polydraft.checkpoints.litertlm": "the header of a .litertlm file, without its weights",
    "polydraft.checkpoints.litertlm_files": "a resolved .litertlm model's file, downloaded if need be",
    "polydraft.checkpoints.compatibility": "whether target and drafter fit, for files that exist only after a download",
    "polydraft.verification": "whether two outputs are equal as far as an engine's numerics allow",
    "polydraft_conformance.testing": "the conformance suite in one's own tests",
}
"""Module -> its purpose. The names in its ``__all__`` are public; CONTRIBUTING says when they may change.

All other modules are private and have an underscore in their path, except those whose names a listed package exports
(``polydraft.contract``, ``polydraft.engine_parts``).
"""
