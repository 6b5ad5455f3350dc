"""The kernels of a step's products against torch's, over shapes and edges, and row by row."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
step_products = pytest.importorskip("polydraft_transformers.step_products")

LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of float64, relative to the largest number
# (in, out): less than a tile, odd ones, Gemma 4's smallest, and ones whose sums are not split.
SHAPES = [(16, 16), (130, 33), (256, 1536), (2816, 128), (2112, 2816), (1000, 4100), (1536, 24576)]
SMALL = [(16, 16), (130, 33), (1100, 64), (200, 290), (260, 600)]


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("rows", [1, 5, 16, 32, 40, 128])
def test_definition_and_rows_of_their_own(device, small, monkeypatch, rows, dtype):
    if small:
        monkeypatch.setattr(step_products, "_PROGRAMS", 9)
    for width, out in SMALL if small else SHAPES:
        torch.manual_seed(rows)
        weight = (torch.randn(out, width, device=device) / width**0.5).to(dtype)
        given = torch.randn(rows, 2 * width, device=device).to(dtype)[:, :width]
        found = step_products.add_parts(step_products.multiply(given, weight), dtype)
        wanted = given.double() @ weight.double().T
        assert (found - wanted).abs().max() / wanted.abs().max() < LIMITS[dtype]
        alone = step_products.add_parts(step_products.multiply(given[-1:], weight), dtype)
        assert torch.equal(alone[0], found[-1])
        inner = step_products.multiply_gated(given, weight)
        assert (inner is None) == (out // 2 <= (step_products._PROGRAMS - 1) * step_products._N)
        if inner is not None:
            gate, up = wanted.chunk(2, -1)
            gated = torch.nn.functional.gelu(gate, approximate="tanh") * up
            assert (inner - gated).abs().max() / gated.abs().max() < 2 * LIMITS[dtype]
            assert torch.equal(step_products.multiply_gated(given[-1:], weight)[0], inner[-1])


@pytest.mark.parametrize(("rows", "dtype"), [(129, torch.bfloat16), (2, torch.float32)])
def test_many_rows_and_float32_are_left_to_torch(device, rows, dtype):
    given, weight = torch.randn(rows, 64, device=device).to(dtype), torch.randn(48, 64, device=device).to(dtype)
    assert torch.equal(step_products.multiply(given, weight), torch.nn.functional.linear(given, weight))


def test_only_on_gpus_with_triton(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(step_products, "triton", object())
    assert step_products.runs_kernels(gpu)
    assert not step_products.runs_kernels(torch.device("cpu"))
    monkeypatch.setattr(step_products, "triton", None)
    assert not step_products.runs_kernels(gpu)


def test_on_a_cpu_torch_multiplies():
    given, weight = torch.randn(3, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    product = step_products.multiply(given, weight)
    assert torch.equal(product, torch.nn.functional.linear(given, weight))
    assert step_products.add_parts(product, torch.bfloat16) is product
    assert step_products.multiply_gated(given, weight) is None


def test_parts_are_added_and_rounded_once():
    parts = torch.tensor([[[1.0]], [[2.0**-8]], [[2.0**-9]]])  # rounded one by one they would stay 1
    assert step_products.add_parts(parts, torch.bfloat16).item() == 1 + 2.0**-7
