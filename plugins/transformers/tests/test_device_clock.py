"""When the parts of a round end."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
device_clock = pytest.importorskip("polydraft_transformers.device_clock")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_times_grow_and_are_nanoseconds(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    times = torch.zeros(3, device=device, dtype=torch.int64)
    rows = torch.randn(2048, 2048, device=device)
    for place in range(3):
        rows = rows @ rows / 2048
        device_clock.stamp(times, place)
    first, second, third = times.tolist()
    assert first < second < third < first + 10**11
