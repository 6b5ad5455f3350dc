"""What llama.cpp's process is told: kernels that overlap gave wrong logits on NVIDIA GPUs from Hopper on."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft_gguf.environment import needed_environment

MODULES = {"llama_cpp": ("llama_cpp", "xllamacpp"), "xllamacpp": ("xllamacpp",)}
VARIABLE = "GGML_CUDA_PDL"
LOADS = f"""
import ctypes, sys
import polydraft
polydraft.load("builtin:tiny-e2b", backend=sys.argv[1], isolation="none", drafter=None).close()
getenv = ctypes.CDLL(None).getenv  # as llama.cpp reads it
getenv.restype = ctypes.c_char_p
print(getenv(b"{VARIABLE}").decode())
"""


@pytest.mark.parametrize("backend", ["llama_cpp", "xllamacpp"])
@pytest.mark.parametrize(("given", "told"), [(None, "0"), ("1", "1")])
def test_the_engine_s_own_process_is_told(backend, given, told):
    if not any(find_spec(module) for module in MODULES[backend]):
        pytest.skip(f"no engine of {backend} is installed")
    own = {name: value for name, value in os.environ.items() if name != VARIABLE}
    own |= {} if given is None else {VARIABLE: given}
    command = [sys.executable, "-c", LOADS, backend]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [told]


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert needed_environment() == {VARIABLE: "0"}
    monkeypatch.setenv(VARIABLE, "1")
    assert needed_environment() == {}
