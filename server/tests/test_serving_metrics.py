"""What `/metrics` says before the first answer."""

from polydraft_server.metrics import Metrics


def test_positions_are_counted_from_0_on():
    page = Metrics("m", lambda: 0, lambda: 0, 3).page().decode()
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    counted = [line for line in page.splitlines() if line.startswith(name)]
    assert counted == [f'{name}{{engine="0",model_name="m",position="{position}"}} 0.0' for position in range(3)]
