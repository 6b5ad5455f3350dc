"""``backends()``, ``devices()``, ``pairs()``; and how records show themselves."""

import polydraft
import pytest
from polydraft._shown import Listing, html_table, html_text
from polydraft.contract import Chunk, GenerationStats, Segment

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")


@pytest.fixture(scope="module")
def result():
    with polydraft.load("builtin:toy", backend="reference") as session:
        assert repr(session).startswith("<Session reference ")
        assert "builtin:toy" in session._repr_html_()
        found = session.generate("Once upon a time", max_new_tokens=30, ignore_eos=True)
    assert repr(session).endswith(", closed>")
    return found


def test_a_stream_says_how_far_it_is():
    with polydraft.load("builtin:toy", backend="reference") as session:
        stream = session.stream("Once", max_new_tokens=9, ignore_eos=True)
        assert repr(stream) == "<TokenStream, not begun>"
        assert repr(session.astream("Once")) == "<AsyncTokenStream, not begun>"
        next(stream)
        assert repr(stream) == "<TokenStream, running>"
        list(stream)
        assert repr(stream) == f"<TokenStream, ended: {stream.result!r}>"


def test_a_misspelt_name_is_an_error_that_python_can_help_with():
    with pytest.raises(AttributeError, match="module 'polydraft' has no attribute 'lod'") as raised:
        polydraft.lod  # noqa: B018
    assert (raised.value.name, raised.value.obj) == ("lod", polydraft)


def test_backends_and_devices():
    found = polydraft.backends()
    reference = next(one for one in found if one.name == "reference")
    assert (reference.installed, reference.usable, reference.serves) == (True, True, False)
    assert isinstance(reference, polydraft.BackendInfo)
    assert [one.usable for one in found] == sorted((one.usable for one in found), reverse=True)
    head, *rows = repr(found).splitlines()
    assert head.split()[:2] == ["backend", "state"]
    assert len(rows) == len(found)
    assert "<table>" in found._repr_html_()
    assert repr(reference).startswith("<BackendInfo reference: usable")
    cpu = next(one for one in polydraft.devices() if one.name == "cpu")
    assert "reference" in cpu.backends
    assert repr(cpu).startswith("<DeviceInfo cpu")


def test_pairs_that_run_here_come_first():
    found = polydraft.pairs()
    runs = [bool(one.backends) for one in found]
    assert runs == sorted(runs, reverse=True)
    (toy,) = polydraft.pairs("builtin:toy")[:1]
    assert toy.target == "builtin:toy"
    assert "reference" in toy.backends
    assert polydraft.pairs("org/unknown") == ()
    assert repr(polydraft.pairs("org/unknown")) == "(none)"


def test_a_result_shows_itself(result):
    assert "".join(one.text for one in result.segments) == result.text
    assert all(one.is_draft != other.is_draft for one, other in zip(result.segments, result.segments[1:], strict=False))
    assert any(one.is_draft for one in result.segments)
    text = repr(result)
    assert len(text) < 300
    assert "ended by length" in text
    assert "tokens 30" in text
    html = result._repr_html_()
    assert html.count('title="accepted draft"') == sum(one.is_draft for one in result.segments)
    assert "acceptance rate" in html
    assert "acceptance rate" in result.stats._repr_html_()


def test_a_chunk_shows_itself():
    chunk = Chunk(
        token_ids=(1, 2),
        text="<b>\x1b",
        num_accepted_tokens=1,
        segments=(Segment(text="<b>", is_draft=True), Segment(text="\x1b", is_draft=False)),
        finish_reason="eos",
    )
    assert repr(chunk) == "<Chunk '<b>\\x1b': 2 tokens, 1 accepted drafts, ended by eos>"
    html = chunk._repr_html_()
    assert "&lt;b&gt;</span>\\x1b" in html
    assert "<b>" not in html


def test_what_is_not_reported_is_not_shown():
    assert repr(GenerationStats(num_tokens=3)) == "<GenerationStats tokens 3>"
    assert html_table([]) == "<i>none</i>"
    assert html_text([("a", False)]).count("span") == 0
    assert Listing([])._repr_html_() == "<i>none</i>"
