"""The built-in pairs as GGUF files, each written once."""

import ctypes
import json
import shutil
from pathlib import Path

import pytest

pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
DATA = Path(pairs.__file__).parent / "data"
QUANTIZED = {"q4_0": 2, "q4_k": 15}
"""Types that llama.cpp itself quantizes to: ``llama_ftype`` by name."""


def quantize(source, target, kind):
    """Let llama.cpp quantize a GGUF file; tensors whose rows do not fill whole blocks get another type."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure = kind, True
    done = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert done == 0


@pytest.fixture(scope="session")
def data():
    return DATA


@pytest.fixture(scope="session")
def gguf(tmp_path_factory):
    """A function: the GGUF file of a built-in model, by name and type of weights."""
    from polydraft_gguf.conversion.write import convert

    folder = tmp_path_factory.mktemp("gguf")

    def make(name, weights="f32"):
        file = folder / f"{name}-{weights}.gguf"
        if not file.is_file() and weights in QUANTIZED:
            quantize(make(name), file, QUANTIZED[weights])
        elif not file.is_file():
            convert(DATA / name, file, weights)
        return file

    return make


@pytest.fixture
def changed(tmp_path):
    """A function: a copy of a built-in model whose config.json or tokenizer.json is changed, as a GGUF file."""
    from polydraft_gguf.conversion.write import convert

    def make(name, change=None, *, tokens=None, file="changed.gguf"):
        folder = tmp_path / f"copy-of-{name}"
        shutil.copytree(DATA / name, folder)
        config = json.loads((folder / "config.json").read_text())
        if change:
            change(config)
        (folder / "config.json").write_text(json.dumps(config))
        if tokens:
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            tokens(tokenizer)
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        convert(folder, tmp_path / file, "f32")
        return tmp_path / file

    return make


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Caches for this run only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYDRAFT_LLAMA_CPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield
