"""Decoding UTF-8 that arrives in pieces."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft.text._tracker import _utf8_decoder

data = st.binary(max_size=24) | st.text(max_size=12).map(str.encode)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=data, cuts=st.lists(st.integers(0, 24), max_size=6))
def test_any_pieces_give_the_whole(data, cuts):
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    decoder = _utf8_decoder()
    pieces = [decoder.decode(data[begin:end]) for begin, end in pairwise(borders)]
    assert "".join(pieces) + decoder.decode(b"", final=True) == data.decode("utf-8", "replace")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=12))
def test_whole_characters_only(text):
    decoder = _utf8_decoder()
    pieces = [decoder.decode(bytes([byte])) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert decoder.decode(b"", final=True) == ""
