"""Tokenizers for the tests of text: bytes with Gemma 4's special tokens, and the built-in pairs' real ones."""

import pytest


@pytest.fixture(scope="session")
def byte_tokenizer():
    module = pytest.importorskip("polydraft_reference.tokenizer", reason="needs polydraft-reference")
    return module.ByteTokenizer()


@pytest.fixture(scope="session")
def builtin_folder():
    """Folder of a built-in model by its name."""
    data = pytest.importorskip("polydraft_builtin_pairs", reason="needs the built-in pairs")
    return data.path


@pytest.fixture(scope="session")
def transformers_tokenizer(builtin_folder):
    """The built-in targets' tokenizer, as Transformers loads it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.AutoTokenizer.from_pretrained(builtin_folder("tiny-e2b"), local_files_only=True)


@pytest.fixture(scope="session")
def hub_tokenizer(transformers_tokenizer):
    from polydraft.text.hub_tokenizer import HubTokenizer

    return HubTokenizer(transformers_tokenizer, eos_token_ids=[1, 5, 13])
