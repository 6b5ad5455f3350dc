"""What ``session.running`` says of precision."""

import polydraft
import pytest
from polydraft.contract import RunningInfo

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")


def test_products_below_the_dtype_are_said():
    with polydraft.load("builtin:toy", backend="reference") as session:
        running = session.running
    assert (running.matmul_precision, running.precision, running.computes) == (None, "float32", "float32")
    other = RunningInfo(**{**dict(running), "matmul_precision": "tf32", "device": "cuda:0"})
    assert (other.precision, other.dtype) == ("tf32", "float32")
    assert other.line.endswith("float32 (tf32 products) on cuda:0")
    assert "float32 (tf32 products) on cuda:0" in other._repr_html_()


def test_a_note_tells_the_user(monkeypatch):
    of = RunningInfo.of.__func__
    monkeypatch.setattr(
        RunningInfo, "of", classmethod(lambda cls, *given, **named: of(cls, *given, matmul_precision="tf32", **named))
    )
    with polydraft.load("builtin:toy", backend="reference") as session:
        (note,) = (note for note in session.running.notes if "tf32" in note)
    assert note.startswith("polydraft-reference rounds the factors of float32 matrix products to tf32 on cpu")
