"""The built-in pairs as GGUF files, each written once."""

from pathlib import Path

import pytest

pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
DATA = Path(pairs.__file__).parent / "data"


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
        if not file.is_file():
            convert(DATA / name, file, weights)
        return file

    return make


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Caches for this run only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYDRAFT_LLAMA_CPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield
