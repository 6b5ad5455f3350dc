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
"""
CENTROID = """
import polydraft
session = polydraft.load("builtin:tiny-e2b", backend="vllm", dtype="float32", num_speculative_tokens=2,
                         context_length=512, engine_options={"kv_cache_memory_bytes": 1 << 26})
result = session.generate("def f(", max_new_tokens=24, ignore_eos=True)
print("ACCEPTED:", result.stats.num_accepted_tokens > 0)
session.close()
"""
NUMBA = """
import numba
from vllm.platforms import current_platform
mends.apply_mends()
current_platform.register_triton_kernel_overrides()
print("REGISTERED")
"""


def test_upstream_still_samples_wrongly(tmp_path):
    found = run(tmp_path, KERNELS, mended=False)
    assert "FAULT: None" not in found, "vLLM samples rightly now: the mend cpu-sampling can go for this version."
    assert "FAULT: " in found


def test_the_mended_verifier_samples_rightly(tmp_path):
    assert "FAULT: None" in run(tmp_path, KERNELS)


def test_upstream_still_dies_of_a_centroid_head(tmp_path):
    # The sampling mend stays, or the self-test would refuse before.
    body = 'mends.MENDS = tuple(m for m in mends.MENDS if m.name != "cpu-centroid-head")\n' + CENTROID
    found = run(tmp_path, body)
    assert "ACCEPTED" not in found, "Centroid heads start on CPU now: the mend cpu-centroid-head can go."
    assert "CUDAGraph" in found


def test_a_centroid_head_runs(tmp_path):
    assert "ACCEPTED: True" in run(tmp_path, CENTROID)


def test_upstream_still_dies_beside_numba(tmp_path):
    found = run(tmp_path, NUMBA, mended=False)
    assert "REGISTERED" not in found, "Engines start beside numba now: the mend cpu-kernels-beside-numba can go."
    assert "_lib_fn_wrapper" in found


def test_engines_start_beside_numba(tmp_path):
    assert "REGISTERED" in run(tmp_path, NUMBA)


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
