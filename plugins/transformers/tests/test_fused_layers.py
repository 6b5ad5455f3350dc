"""The kernels between a layer's products against their definitions, over shapes and edges, and row by row."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
fused_layers = pytest.importorskip("polydraft_transformers.fused_layers")

# Of float64, relative to the largest number: a few roundings of each dtype, one after the other.
LIMITS = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(LIMITS)
Norm = fused_layers.Norm


@pytest.fixture
def drawn(device):
    def draw(*shape, dtype, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    return draw


def close(found, wanted):
    """Whether a result equals that of float64, up to rounding."""
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return found.dtype in LIMITS and error < LIMITS[found.dtype]


@pytest.fixture
def in_parts(drawn):
    """Rows that are strided, or that are the sum of parts."""

    def draw(rows, width, dtype, parts, scale=1.0):
        if parts > 1:
            return drawn(parts, rows, width, dtype=torch.float32, scale=scale)
        return drawn(rows, 2 * width, dtype=dtype, scale=scale)[:, :width]

    return draw


def in_double(norm):
    weight = None if norm.weight is None else norm.weight.double()
    like = norm._gain.double()
    return Norm(weight, norm._shape[0], norm.eps, like, factor=norm.factor)


def places_of(pairs):
    """As ``KvCache.places`` gives them: of several sequences, keys and values of each."""
    rows = [[keys.data_ptr(), values.data_ptr(), keys.shape[2]] for keys, values in pairs]
    return torch.tensor(rows, device=pairs[0][0].device)


@pytest.mark.parametrize("lots", range(24), indirect=True)
def test_added_and_normed(device, small, drawn, in_parts, lots):
    dtype, rows, width = lots.choice(DTYPES), lots.between(1, 5, 70), lots.between(16, 1536, 5376)

    def norm(**options):
        weight = 1 + drawn(width, dtype=dtype, scale=0.1) if options or lots.random() < 0.9 else None
        return Norm(weight, width, 1e-6, hidden, **options)

    # Residual rows are much larger than what is added, or much smaller, or 0.
    hidden = drawn(rows, width, dtype=dtype, scale=lots.choice([1.0, 50.0, 0.0]))
    branch = in_parts(rows, width, dtype, lots.between(1, 1, 2, 8), scale=lots.choice([1.0, 1e-3]))
    before = [norm() for _ in range(lots.randrange(4))]
    if before and lots.random() < 0.5:
        before[-1] = norm(factor=width**-0.5)
    scalar = lots.choice([None, torch.tensor([0.7], device=device, dtype=dtype)])
    top_k = lots.between(0, 0, 2, 8)
    found = drawn(rows, top_k, width, dtype=torch.float32) if top_k else hidden
    mixture = (found, norm(), norm()) if top_k or lots.random() < 0.3 else None
    after = norm()
    sums = fused_layers.add_normed(hidden, branch, after, before, scalar=scalar, mixture=mixture)
    wanted = fused_layers.add_normed_by_definition(
        hidden.double(),
        branch.double(),
        in_double(after),
        [in_double(norm) for norm in before],
        scalar=None if scalar is None else scalar.double(),
        mixture=None if mixture is None else (found.double(), *map(in_double, mixture[1:])),
    )
    assert len(sums) == len(wanted) == 1 + len(before)
    assert all(close(*pair) for pair in zip(sums, wanted, strict=True))
    for row in lots.sample(range(rows), min(rows, 3) if small else rows):
        part = slice(row, row + 1)
        own = None if mixture is None else (found[part], *mixture[1:])
        alone = fused_layers.add_normed(hidden[part], branch[..., part, :], after, before, scalar=scalar, mixture=own)
        assert all(torch.equal(one[0], every[row]) for one, every in zip(alone, sums, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 256, 1023, 1025, 21504])
def test_gated(device, in_parts, dtype, width):
    for gate_parts, up_parts in ((1, 1), (4, 1), (2, 2)):
        gate, up = in_parts(5, width, dtype, gate_parts, scale=4.0), in_parts(5, width, dtype, up_parts)
        # From far below 0 to far above: the approximation's tails.
        gate[..., 0, :] = torch.linspace(-60, 60, width, device=device) / gate_parts
        found = fused_layers.gated(gate, up, dtype)
        assert close(found, fused_layers.gated_by_definition(gate.double(), up.double(), torch.float64))
        assert torch.equal(fused_layers.gated(gate[..., 2:3, :], up[..., 2:3, :], dtype)[0], found[2])


def test_more_elements_than_32_bits_count(device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # only three rows are touched
    stride = 2**30 + 16
    gate = torch.empty(2 * stride + 64, device=device, dtype=torch.float16).as_strided((3, 64), (stride, 1))
    gate.copy_(torch.randn(3, 64, device=device))
    up = torch.randn(3, 64, device=device).half()
    found = fused_layers.gated(gate, up, torch.float16)
    assert close(found, fused_layers.gated_by_definition(gate.double(), up.double(), torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(drawn, value):
    rows = drawn(3, 64, dtype=torch.bfloat16)
    rows[1, 5] = value
    norm = Norm(None, 64, 1e-6, rows)
    for found in (
        *fused_layers.add_normed(rows, rows.clone(), norm, [norm]),
        fused_layers.gated(rows, rows, rows.dtype),
    ):
        assert not found[1].isfinite().all()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("lots", range(16), indirect=True)
def test_rotated_and_stored(device, small, drawn, lots):
    dtype, rows, dim = lots.choice(DTYPES), lots.between(1, 5, 8, 17), lots.choice([16, 64, 128, 256, 512])
    heads, kv_heads = lots.between(1, 4 if small else 32), lots.between(0, 1, 2 if small else 16)
    shared = lots.random() < 0.5
    size = heads + kv_heads * (1 if shared else 2)
    parts = lots.choice([1, 1, 3])
    projected = drawn(parts, rows, size, dim, dtype=torch.float32) if parts > 1 else drawn(rows, size, dim, dtype=dtype)
    gain = 1 + drawn(heads + kv_heads, dim, dtype=dtype, scale=0.1)
    angles = torch.rand(rows, 1, dim, device=device) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norm = Norm(None, dim, 1e-6, gain)
    slots = torch.randperm(300, device=device)[:rows]
    buffers = [drawn(1, max(kv_heads, 1), 300, dim, dtype=dtype) for _ in range(2)]
    before = [buffer.clone() for buffer in buffers]

    def stored_in(pair, slots):
        return fused_layers.Stored(places_of([pair]), slots, kv_heads) if kv_heads else None

    stored = stored_in(buffers, slots)
    queries = fused_layers.rotate_and_store(projected, norm, gain, cos, sin, heads, stored)
    wanted = fused_layers.rotate_and_store_by_definition(
        projected.double().view(parts, rows, size, dim).sum(0),
        in_double(norm),
        gain.double(),
        cos.double(),
        sin.double(),
        heads,
        kv_heads,
    )
    assert close(queries, wanted[0])
    for buffer, old, rows_wanted in zip(buffers, before, wanted[1:], strict=True):
        if kv_heads:
            assert close(buffer[0, :, slots].transpose(0, 1), rows_wanted)
            old[:, :, slots] = buffer[:, :, slots]
        assert torch.equal(buffer, old)  # no other slot was written
    alone = fused_layers.rotate_and_store(
        projected[..., -1:, :, :].contiguous(),
        *(norm, gain, cos[-1:], sin[-1:], heads),
        stored_in(before, slots[-1:]),
    )
    assert torch.equal(alone[0], queries[-1])
    assert all(map(torch.equal, before, buffers))


def test_on_a_cpu_the_definition_runs():
    rows = torch.randn(3, 24)
    norm = Norm(torch.rand(24), 24, 1e-6, rows)
    sums = fused_layers.add_normed(rows, rows, norm, [norm], mixture=(rows[:, None].expand(3, 2, 24), norm, norm))
    mixed = norm.added(norm(rows), 2 * rows)
    assert torch.equal(sums[0], norm.added(rows, mixed))
    assert (sums[0] - (rows + norm(norm(rows) + norm(2 * rows)))).abs().max() < 1e-5
    assert torch.equal(sums[1], norm(sums[0]))
