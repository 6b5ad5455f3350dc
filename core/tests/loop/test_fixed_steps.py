"""``exactness="bitwise"`` is checked at load: engines whose rows depend on other rows or the shape are refused."""

import time

import numpy as np
import pytest
from polydraft._load import open_session
from polydraft.errors import UnsupportedError

pytest.importorskip("polydraft_reference", reason="the check is tested on the reference engine: polydraft-reference")

from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.sequence import ReferenceSequence


class Nudging(ReferenceSequence):
    """Adds one unit in the last place of float32 to all logits of some rows of a step."""

    def nudged(self, row, token_ids):
        raise NotImplementedError

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.astype(np.float32)
        for row in range(len(token_ids)):
            if self.nudged(row, token_ids):
                logits[row] = np.nextafter(logits[row], np.float32(np.inf))
        return super().choose(logits, token_ids, sampler, keep_logits)


class ByPlace(Nudging):
    """The last row of a full step is computed by another kernel."""

    def nudged(self, row, token_ids):
        return row == 4


class ByNeighbours(Nudging):
    """A row depends on whether another token of the step chose the same expert of eight."""

    def nudged(self, row, token_ids):
        return [token % 8 for token in token_ids].count(token_ids[row] % 8) > 2


class ByNumber(Nudging):
    """Steps of several tokens use other kernels than steps of one."""

    def nudged(self, row, token_ids):
        return len(token_ids) > 1


class PastTheWindow(ByNumber):
    """The same, for positions that the sliding window has left behind."""

    def nudged(self, row, token_ids):
        return super().nudged(row, token_ids) and self.length > 2 * 16


class SlowPastTheWindow(PastTheWindow):
    """The same, on a machine where the time limit allows a few steps."""

    def verify(self, token_ids, sampler, *, keep_logits=False):
        time.sleep(0.02)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)


class AfterRollback(ReferenceSequence):
    """A rollback forgets the newest row's KV wrongly: rejected drafts leave a trace."""

    def rollback(self, length):
        self.rolled = length < self.length
        super().rollback(length)

    def choose(self, logits, token_ids, sampler, keep_logits):
        if getattr(self, "rolled", False):
            logits = np.nextafter(logits.astype(np.float32), np.float32(np.inf))
        self.rolled = False
        return super().choose(logits, token_ids, sampler, keep_logits)


def load(kit, monkeypatch, sequence_class, **fields):
    monkeypatch.setattr(ReferenceEngine, "sequence_class", sequence_class)
    return open_session(kit.backend, kit.request("mtp", 4, exactness="bitwise", **fields))


@pytest.mark.parametrize("defect", [ByPlace, ByNeighbours, ByNumber, PastTheWindow, SlowPastTheWindow])
def test_an_engine_whose_rows_are_not_their_own_is_refused(kit, monkeypatch, defect):
    closed = []

    def close(self):
        closed.append(self)

    monkeypatch.setattr(ReferenceEngine, "close", close)
    with pytest.raises(UnsupportedError, match="tokens have different logits") as caught:
        load(kit, monkeypatch, defect)
    assert "standard" in caught.value.hint
    assert len(closed) == 1


def test_a_trace_of_rejected_drafts_is_found(kit, monkeypatch):
    with pytest.raises(UnsupportedError, match="bitwise"):
        load(kit, monkeypatch, AfterRollback)


def test_an_engine_that_keeps_its_bits_is_loaded(kit, monkeypatch):
    opened, closed = [], []

    class Counted(ReferenceSequence):
        def __init__(self, engine):
            super().__init__(engine)
            opened.append(self)

        def close(self):
            closed.append(self)
            super().close()

    with load(kit, monkeypatch, Counted) as session:
        assert session.running.exactness == "bitwise"
    assert len(opened) >= 3  # a short prompt, and the ends of the window
    assert set(opened) == set(closed)


def test_places_that_would_take_too_long_are_named(kit, monkeypatch):
    class SlowPrompts(ReferenceSequence):
        def prefill(self, token_ids, sampler, *, keep_logits=False):
            time.sleep(0.05 * len(token_ids))
            return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    with load(kit, monkeypatch, SlowPrompts) as session:
        assert any("not measured around position" in note for note in session.running.notes)


def test_ordinary_sessions_are_not_measured(kit, monkeypatch):
    monkeypatch.setattr(ReferenceEngine, "sequence_class", ByNumber)
    with open_session(kit.backend, kit.request("mtp", 4)) as session:
        assert session.running.exactness == "standard"
