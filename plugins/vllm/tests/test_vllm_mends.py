"""Each mend is needed, and does what it says. Where upstream no longer needs one, its first test here fails."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("vllm")

# Each in a process of its own: a mend stays, and the unmended engine must never have been mended.
PRELUDE = """
import warnings; warnings.simplefilter("ignore")
import sys
from polydraft_vllm.environment import prepare_environment
prepare_environment(cpu=True)
import polydraft_vllm.mends as mends
def main():
{body}
if __name__ == "__main__":
    main()
"""


def run(tmp_path, body, *, mended=True):
    """Run in a process whose vLLM is mended or not; returns its standard output."""
    lines = "" if mended else "mends.MENDS = ()\n"
    script = tmp_path / "script.py"
    script.write_text(PRELUDE.format(body=textwrap.indent(lines + textwrap.dedent(body), "    ")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    return done.stdout + done.stderr[-3000:]


KERNELS = """
from vllm.platforms import current_platform
current_platform.register_triton_kernel_overrides()
mends.apply_mends()
from polydraft_vllm.self_test import sampling_fault
print("FAULT:", sampling_fault())
import torch
from types import SimpleNamespace
from vllm.v1.sample import rejection_sampler
settings = SimpleNamespace(all_greedy=False, temperature=torch.ones(1), top_k=torch.tensor([3]), top_p=None)
try:
    rejection_sampler.apply_sampling_constraints(torch.empty(0, 8), torch.zeros(1, dtype=torch.int32), settings)
    print("NO ROWS ARE FINE")
except RuntimeError as error:
    print("NO ROWS:", error)
import numba
try:
    current_platform.register_triton_kernel_overrides()
    print("REGISTERED")
except AttributeError as error:
    print("DIED:", error)
"""
CENTROID = """
mends.MENDS = tuple(mend for mend in mends.MENDS if mend.name != "cpu-centroid-head")
import polydraft
session = polydraft.load("builtin:tiny-e2b", backend="vllm", dtype="float32", num_speculative_tokens=2,
                         context_length=512, engine_options={"kv_cache_memory_bytes": 1 << 26})
print("STARTED")
session.close()
"""


def test_upstream_still_needs_the_mends_of_the_kernels(tmp_path):
    found = run(tmp_path, KERNELS, mended=False)
    assert "FAULT: None" not in found, "vLLM samples rightly now: the mend cpu-sampling can go for this version."
    assert "FAULT: " in found
    assert "NO ROWS ARE FINE" not in found, "Steps without drafts take a top_k now: the mend cpu-top-k can go."
    assert "NO ROWS: max()" in found
    assert "REGISTERED" not in found, "Engines start beside numba now: the mend cpu-kernels-beside-numba can go."
    assert "DIED: '_lib_fn_wrapper'" in found


def test_with_the_mends_it_samples_rightly_and_starts_beside_numba(tmp_path):
    found = run(tmp_path, KERNELS)
    assert "FAULT: None" in found
    assert "NO ROWS ARE FINE" in found
    assert "REGISTERED" in found


def test_upstream_still_dies_of_a_centroid_head(tmp_path):
    """With the mend it runs: the shared session of these tests has such a drafter."""
    found = run(tmp_path, CENTROID)
    assert "STARTED" not in found, "Centroid heads start on CPU now: the mend cpu-centroid-head can go."
    assert "CUDAGraph" in found


def test_expanded_values():
    import torch
    from polydraft_vllm.mends import expand_batch_to_tokens

    values, ends = torch.tensor([0.0, 0.7, 1.0]), torch.tensor([2, 2, 5], dtype=torch.int32)
    found = expand_batch_to_tokens(values, ends, 5, replace_from=0, replace_to=1)
    assert found.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]
    assert expand_batch_to_tokens(torch.tensor([3, 9], dtype=torch.int32), torch.tensor([1, 3]), 3).tolist() == [
        3,
        9,
        9,
    ]
    assert expand_batch_to_tokens(values, ends, 5).dtype == values.dtype
