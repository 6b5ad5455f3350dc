"""The processor, from what platforms say of it, and what dtype="auto" means on it."""

import json
import struct

import pytest
from polydraft import hardware

PROCESSORS = {
    "AVX2": "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx avx2 fma f16c\n",
    "AVX-512": "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: avx2 avx512f avx512_vnni\n",
    "AVX512-BF16": "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: avx2 avx512f avx512_bf16\n",
    "AMX": "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: avx512f amx_bf16 avx512_fp16\n",
    "Arm": "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
    "old Arm": "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd03\n",
}
NATIVE = {"AVX512-BF16": {"bfloat16"}, "AMX": {"bfloat16", "float16"}, "Arm": {"bfloat16", "float16"}}


@pytest.fixture
def running_on(monkeypatch, tmp_path):
    """Let a processor of PROCESSORS be this machine's, or none that is known."""

    def clear():
        hardware._cpuinfo.cache_clear()
        hardware.cpu_features.cache_clear()

    def choose(name):
        file = tmp_path / "cpuinfo"
        if name:
            file.write_text(f"{PROCESSORS[name]}\n{PROCESSORS[name]}")  # two cores
        monkeypatch.setattr(hardware, "_CPUINFO", file)
        clear()

    monkeypatch.setattr(hardware.platform, "system", lambda: "Linux")
    yield choose
    clear()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of 1,000 weights, as far as headers show it."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [10, 100], "data_offsets": [0, 2000]}}).encode()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2000))
    return tmp_path / "model"


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_what_a_processor_multiplies(running_on, name, dtype):
    running_on(name)
    assert hardware.multiplies_natively(dtype) == (dtype in {"float32", "float64"} | NATIVE.get(name, set()))


def test_two_processors_of_one_name_are_told_apart(running_on):
    found = {}
    for name in PROCESSORS:
        running_on(name)
        found[name] = hardware.cpu_model()
        assert hardware.processor()
    assert len({*found.values()}) == len(PROCESSORS)
    assert "AMD EPYC" in found["AVX2"]
    assert "AMD EPYC" in found["AVX512-BF16"]


def test_a_platform_that_says_nothing(running_on):
    running_on(None)
    assert hardware.cpu_features() == frozenset()
    assert not hardware.multiplies_natively("bfloat16")
    assert hardware.cpu_model()


def test_auto_is_float32_where_the_checkpoints_dtype_is_emulated(running_on, folder):
    running_on("AVX-512")
    dtype, note = hardware.cpu_dtype({"dtype": "bfloat16"}, [folder], free_bytes=10**6)
    assert dtype == "float32"
    assert "bfloat16" in note
    assert hardware.cpu_dtype({"text_config": {"dtype": "float16"}}, [folder], 10**6)[0] == "float32"


def test_auto_is_the_checkpoints_own_where_float32_does_not_fit(running_on, folder):
    running_on("AVX2")
    dtype, note = hardware.cpu_dtype({"torch_dtype": "torch.bfloat16"}, [folder, folder], free_bytes=10_000)
    assert dtype == "bfloat16"
    assert "emulates" in note


@pytest.mark.parametrize(
    ("name", "config", "own"),
    [
        ("AMX", {"dtype": "bfloat16"}, "bfloat16"),
        ("Arm", {"dtype": "float16"}, "float16"),
        ("AVX2", {"dtype": "float32"}, "float32"),
        ("AVX2", {}, "float32"),
        ("AVX2", {"dtype": "bfloat16", "quantization": {"bits": 4}}, "bfloat16"),
        ("AVX2", {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
    ],
)
def test_auto_is_else_the_checkpoints_own(running_on, folder, name, config, own):
    running_on(name)
    assert hardware.cpu_dtype(config, [folder], free_bytes=10**6) == (own, "")


# --- memory ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 8 MiB free, whose control groups the test writes."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    for folder in (proc / "self", groups):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {16 << 10} kB\nMemAvailable: {8 << 10} kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(hardware, "_PROC", proc)
    monkeypatch.setattr(hardware, "_CGROUPS", groups)

    def group(path, **files):
        (groups / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (groups / path / name.replace("__", ".")).write_text(f"{text}\n")

    def belongs(*lines):
        (proc / "self/cgroup").write_text("\n".join(lines) + "\n")

    return group, belongs


V2 = {"memory__current": 3 << 20, "memory__stat": f"anon 5\ninactive_file {1 << 20}"}
V1 = {"memory__usage_in_bytes": 3 << 20, "memory__stat": f"cache 5\ntotal_inactive_file {1 << 20}"}


def test_memory_without_control_groups(machine):
    assert hardware.free_memory() == 8 << 20


@pytest.mark.parametrize(
    ("line", "path", "files"),
    [
        ("0::/", ".", {"memory__max": 5 << 20, **V2}),  # inside a container
        ("0::/user/run", "user/run", {"memory__max": 5 << 20, **V2}),
        ("0::/user/run", "user", {"memory__max": 5 << 20, **V2}),  # the limit of a group above
        ("0::/user/run", "unified/user", {"memory__max": 5 << 20, **V2}),
        ("4:memory:/docker/1", "memory/docker/1", {"memory__limit_in_bytes": 5 << 20, **V1}),
        ("4:memory:/docker/1", "memory", {"memory__limit_in_bytes": 5 << 20, **V1}),  # the path is the host's
        ("3:cpu,memory:/a", "cpu,memory/a", {"memory__limit_in_bytes": 5 << 20, **V1}),
    ],
)
def test_a_containers_limit_counts(machine, line, path, files):
    group, belongs = machine
    belongs("9:name=systemd:/", line)
    group(path, **files)
    assert hardware.free_memory() == 3 << 20  # 5 - 3 used, of which 1 can be dropped
    group(
        path,
        **{name: "max" if name == "memory__max" else 2**63 - 4096 for name in files if "max" in name or "lim" in name},
    )
    assert hardware.free_memory() == 8 << 20
    group(path, **{name: 1 << 20 for name in files if "max" in name or "limit" in name})
    assert hardware.free_memory() == 0  # more is used than is allowed: never negative


def test_broken_control_groups(machine):
    group, belongs = machine
    belongs("0::/")
    group(".", memory__max="many", memory__current="few")
    assert hardware.free_memory() == 8 << 20
