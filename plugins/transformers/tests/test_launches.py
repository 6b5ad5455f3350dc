"""What a launch of a kernel passes on, and when Triton is asked for a compiled kernel."""

import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from polydraft_transformers.launches import Launcher  # noqa: E402


class Compiled:
    def __init__(self, number, launched):
        self.number = number
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *values: self.launched.append((self.number, grid, values))


class Compiling:
    """In place of Triton's kernel: notes for what it was asked, and gives what notes how it was launched."""

    def __init__(self):
        names = ("x", "size", "BLOCK", "TOP")
        self.params = [types.SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in names]
        self.asked = []
        self.launched = []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **constants):
            self.asked.append((grid, arguments, constants))
            return Compiled(len(self.asked), self.launched)

        return compile_and_launch


@pytest.fixture
def compiling():
    return Compiling()


def test_a_known_call_is_launched_at_once_with_addresses(compiling):
    launcher, rows = Launcher(compiling), torch.zeros(64)
    launcher[(2,)](rows, 32, TOP=1, BLOCK=8, num_warps=4)
    launcher[(3, 4)](rows, 48, TOP=1, BLOCK=8, num_warps=4)
    assert compiling.asked == [((2,), (rows, 32), {"TOP": 1, "BLOCK": 8, "num_warps": 4})]
    assert compiling.launched == [(1, (3, 4, 1), (rows.data_ptr(), 48, 8, 1))]  # constants in the kernel's order


@pytest.mark.parametrize(
    ("x", "size", "constants"),
    [
        (torch.zeros(64)[1:], 32, {}),  # another alignment
        (torch.zeros(64, dtype=torch.bfloat16), 32, {}),
        (torch.zeros(64), 33, {}),  # not divisible by 16
        (torch.zeros(64), 1, {}),
        (torch.zeros(64), 1 << 35, {}),  # 64 bits
        (torch.zeros(64), 32.0, {}),
        (torch.zeros(64), 32, {"BLOCK": 16}),
        (torch.zeros(64), 32, {"num_warps": 8}),
    ],
)
def test_what_triton_compiles_anew_for_is_asked_for(compiling, x, size, constants):
    launcher = Launcher(compiling)
    launcher[(2,)](torch.zeros(64), 32, BLOCK=8, TOP=1, num_warps=4)
    for _ in range(2):
        launcher[(2,)](x, size, **{"BLOCK": 8, "TOP": 1, "num_warps": 4} | constants)
    assert len(compiling.asked) == 2
    assert [number for number, _, _ in compiling.launched] == [2]


def test_a_kernel_belongs_to_its_device(compiling, monkeypatch):
    launcher, rows = Launcher(compiling), torch.zeros(64)
    launcher[(2,)](rows, 32, BLOCK=8, TOP=1)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 1)
    launcher[(2,)](rows, 32, BLOCK=8, TOP=1)
    assert len(compiling.asked) == 2
