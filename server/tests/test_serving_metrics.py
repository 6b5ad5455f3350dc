"""What `/metrics` says of drafts before the first answer, and where no answer reports them."""

from types import SimpleNamespace

import pytest
from polydraft import GenerationStats
from polydraft.contract import OffReason
from polydraft_server.metrics import Metrics


def test_positions_are_counted_from_0_on():
    page = Metrics("m", lambda: 0, lambda: 0, 3).page().decode()
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    counted = [line for line in page.splitlines() if line.startswith(name)]
    assert counted == [f'{name}{{engine="0",model_name="m",position="{position}"}} 0.0' for position in range(3)]


OFF = OffReason(code="caller", message="Off.")


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        ([], True),
        ([(0, OFF)], True),
        ([(None, None)], False),
        ([(0, OFF), (None, None), (0, OFF)], False),
        ([(3, None), (None, None)], True),
        ([(None, None), (3, None)], True),
    ],
)
def test_drafts_that_no_answer_reports_are_not_0(answers, shown):
    metrics = Metrics("m", lambda: 0, lambda: 0, 3)
    for drafts, off in answers:
        stats = GenerationStats(num_tokens=4, num_drafts=drafts)
        metrics.ended(SimpleNamespace(stats=stats, speculation_off=off), 0.1, "stop")
    page = metrics.page().decode()
    assert ("vllm:spec_decode_num_drafts_total" in page) == shown
    assert "vllm:generation_tokens_total" in page
