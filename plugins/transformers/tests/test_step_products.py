"""The kernels of a step's products against torch's, over shapes and edges, and row by row."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
step_products = pytest.importorskip("polydraft_transformers.step_products")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of float64, relative to the largest number
# (in, out): less than a tile, odd ones, Gemma 4's smallest, and ones whose sums are not split.
SHAPES = [(16, 16), (130, 33), (256, 1536), (2816, 128), (2112, 2816), (1000, 4100), (1536, 24576)]


@needs_gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 16, 32, 40, 128])
def test_definition_and_rows_of_their_own(shape, rows, dtype):
    torch.manual_seed(rows)
    width, out = shape
    weight = (torch.randn(out, width, device="cuda") / width**0.5).to(dtype)
    given = torch.randn(rows, 2 * width, device="cuda").to(dtype)[:, :width]
    found = step_products.add_parts(step_products.multiply(given, weight), dtype)
    wanted = given.double() @ weight.double().T
    assert (found - wanted).abs().max() / wanted.abs().max() < LIMITS[dtype]
    alone = step_products.add_parts(step_products.multiply(given[-1:], weight), dtype)
    assert torch.equal(alone[0], found[-1])
    inner = step_products.multiply_gated(given, weight)
    assert (inner is None) == (out // 2 < 8192 - 31)
    if inner is not None:
        gate, up = wanted.chunk(2, -1)
        gated = torch.nn.functional.gelu(gate, approximate="tanh") * up
        assert (inner - gated).abs().max() / gated.abs().max() < 2 * LIMITS[dtype]
        assert torch.equal(step_products.multiply_gated(given[-1:], weight)[0], inner[-1])


@needs_gpu
@pytest.mark.parametrize(("rows", "dtype"), [(129, torch.bfloat16), (2, torch.float32)])
def test_many_rows_and_float32_are_left_to_torch(rows, dtype):
    given, weight = torch.randn(rows, 64, device="cuda").to(dtype), torch.randn(48, 64, device="cuda").to(dtype)
    assert torch.equal(step_products.multiply(given, weight), torch.nn.functional.linear(given, weight))


def test_on_a_cpu_torch_multiplies():
    given, weight = torch.randn(3, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    product = step_products.multiply(given, weight)
    assert torch.equal(product, torch.nn.functional.linear(given, weight))
    assert step_products.add_parts(product, torch.bfloat16) is product
    assert step_products.multiply_gated(given, weight) is None


def test_parts_are_added_and_rounded_once():
    parts = torch.tensor([[[1.0]], [[2.0**-8]], [[2.0**-9]]])  # rounded one by one they would stay 1
    assert step_products.add_parts(parts, torch.bfloat16).item() == 1 + 2.0**-7
