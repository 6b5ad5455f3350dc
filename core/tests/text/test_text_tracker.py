"""The tracker against a slow, simple reference, for every way of cutting the stream."""

import re
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.text._chat_parser import _QUOTE_TOKENS, parse_tool_calls
from polydraft.text._tracker import OutputTracker

QUOTE, CALL, CALL_END, CHANNEL, CHANNEL_END = '<|"|>', "<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>"
PIECES = [
    *(
        "a",
        "b",
        "ab",
        "aba",
        "\n",
        " ",
        "thought\n",
        "call:f{",
        "x:1",
        "x:",
        "}",
        '"',
        "\\",
        "é",
        "日本",
        "🙂",
        "<",
        "<turn",
    ),
    *(b"\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82", b"\xff"),
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<turn|>", "<eos>", "<|think|>", "<bos>"),
]
STOPS = [
    "a",
    "ab",
    "aba",
    "b\n",
    "é",
    "日本",
    "本🙂",
    "<turn",
    "<turn|>",
    "b<turn|>",
    "<channel|>a",
    "}<tool_call|>",
    "\n",
]
RELAXED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def ids_of(tokenizer, pieces):
    found = []
    for piece in pieces:
        found += list(piece) if isinstance(piece, bytes) else tokenizer.encode(piece)
    return found


def track(tokenizer, ids, *, takes=(), chat=True, eos=frozenset(), prompt=(65,), drafts=frozenset(), **given_settings):
    """Push the tokens; take text after those whose index is in ``takes``. Returns tracker, deltas, tokens pushed."""
    values = GenerationSettings(**{"max_new_tokens": 10**6, **given_settings})
    request = TokenRequest(
        prompt_token_ids=prompt,
        settings=values,
        seed=0,
        speculate=False,
        num_speculative_tokens=0,
        eos_token_ids=eos,
        max_total_tokens=10**7,
    )
    tracker = OutputTracker(tokenizer, request, parse_chat=chat)
    deltas = []
    for index, token_id in enumerate(ids):
        reason = tracker.push(token_id, is_draft=index in drafts)
        if reason is not None:
            break
        if index in takes:
            deltas.append(tracker.take())
    deltas.append(tracker.finish("cancelled"))
    return tracker, deltas


# The reference


@dataclass
class Cell:
    """One character of the raw text."""

    character: str
    token: str = ""  # the special token whose name it belongs to
    last: bool = True  # whether it is the last character of the name


def unfinished(data):
    """Number of trailing bytes that start a character which may still be completed."""
    for length in (3, 2, 1):
        try:
            data[-length:].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return length
    return 0


def cells_of(tokenizer, ids, *, whole):
    found, run = [], b""
    for token_id in ids:
        if token_id not in tokenizer.special_token_ids:
            run += tokenizer.token_bytes(token_id)
            continue
        found += [Cell(character) for character in run.decode("utf-8", "replace")]
        run = b""
        name = tokenizer.token_bytes(token_id).decode()
        found += [Cell(character, name, index == len(name) - 1) for index, character in enumerate(name)]
    run = run if whole else run[: len(run) - unfinished(run)]
    return found + [Cell(character) for character in run.decode("utf-8", "replace")]


def written(cells):
    return "".join(cell.character for cell in cells)


def marked(cells):
    return "".join(_QUOTE_TOKENS[0][0] if is_at([cell], 0, QUOTE) else cell.character for cell in cells)


def seen(cells):
    return "".join(cell.character for cell in cells if not cell.token)


def is_at(cells, index, *names):
    return index < len(cells) and cells[index].token in names and cells[index].last


def units_of(cells):
    """The cells, whole names of special tokens joined to one; the name that a stop string cut stays in pieces."""
    found, name = [], []
    for cell in cells:
        name.append(cell)
        if cell.last:
            found.append(Cell(written(name), cell.token))
            name = []
    return found + name


def end_of_call(units, start, *, follow):
    """(index of the bracket that ends the call, or the length; whether strings were followed; the call's units)."""
    string, index, kept = "", start, []
    while index < len(units):
        if not string and is_at(units, index, CALL, CALL_END):
            return index, follow, kept
        # A bracket that is cut off at the end of the output has no effect, and is no text.
        if string or units[index].last or units[index].token not in (CALL, CALL_END):
            kept.append(units[index])
        if is_at(units, index, QUOTE) and string != '"':
            string = "" if string or not follow else QUOTE
        elif string != QUOTE and follow and units[index].token != QUOTE:
            for character in units[index].character:
                if string == "escaped":
                    string = '"'
                elif character == '"':
                    string = "" if string else '"'
                elif character == "\\" and string:
                    string = "escaped"
        index += 1
    inner = [index for index in range(start, len(units)) if is_at(units, index, CALL_END)]
    return (inner[0], False, units[start : inner[0]]) if inner else (len(units), follow, kept)


def account(cells):
    """(text, thinking, calls) of the characters that were kept."""
    text, thinking, calls, index, follow, units = "", "", [], 0, True, units_of(cells)
    while index < len(units):
        if is_at(units, index, CHANNEL):
            start = index + 1
            ends = [end for end in range(start, len(units)) if is_at(units, end, CALL, CHANNEL_END)]
            index = ends[0] if ends else len(units)
            line, newline, rest = seen(units[start:index]).partition("\n")
            thinking += rest if re.fullmatch(r"\s*\w*\s*", line) else line + newline + rest
            index += is_at(units, index, CHANNEL_END)
        elif is_at(units, index, CALL):
            index, follow, kept = end_of_call(units, index + 1, follow=follow)
            parsed = parse_tool_calls(marked(kept), _QUOTE_TOKENS) if index < len(units) else []
            calls += parsed
            text += "" if parsed else written(kept)
            index += is_at(units, index, CALL_END)
        else:
            text += seen(units[index : index + 1])
            index += 1
    return text, thinking, tuple(calls)


def expected(tokenizer, ids, *, stop=(), chat=True, eos=frozenset(), min_new_tokens=0):
    """(tokens, reason, what matched, text, thinking, calls, raw text)."""
    reason, match, cut, before, count = "cancelled", None, None, 0, 0
    for count in range(1, len(ids) + 1):
        raw = "".join(cell.character for cell in cells_of(tokenizer, ids[:count], whole=False))
        ends = sorted(
            (end, -len(text), text)
            for text in stop
            for end in range(before + 1, len(raw) + 1)
            if raw[:end].endswith(text)
        )
        before = len(raw)
        if count <= min_new_tokens:
            continue
        if ids[count - 1] in eos:
            reason, match = "eos", ids[count - 1]
            break
        if ends:
            reason, match, cut = "stop", ends[0][2], ends[0][0] + ends[0][1]
            break
    cells = cells_of(tokenizer, ids[:count], whole=True)
    kept = cells[:cut]
    if reason == "eos":
        kept = cells_of(tokenizer, ids[: count - 1], whole=True)  # the end is not a part of anything
    text, thinking, calls = account(kept) if chat else (seen(kept), "", ())
    return tuple(ids[:count]), reason, match, text, thinking, calls, written(cells)


def outcome(tracker):
    return (
        tracker.token_ids,
        tracker.finish_reason,
        tracker.stop_match,
        tracker.text,
        tracker.thinking,
        tracker.tool_calls,
        tracker.raw_text,
    )


# Properties

pieces = st.lists(st.sampled_from(PIECES), min_size=1, max_size=14)
stops = st.lists(st.sampled_from(STOPS), max_size=3, unique=True)
cuts = st.sets(st.integers(0, 60))


@RELAXED
@given(pieces=pieces, stop=stops, takes=cuts, min_new_tokens=st.integers(0, 6), chat=st.booleans(), ends=st.booleans())
@example(  # an ignored match early in a token's text once left the matcher behind
    pieces=["aba", "b\n"], stop=["a", "ab"], takes={0}, min_new_tokens=2, chat=False, ends=False
)
@example(  # text held back for a stop string once lost its first line to the next channel
    pieces=["<|channel>", "thought\n", "ab", "<channel|>", "<|channel>", "thought\n", "b", "<channel|>"],
    stop=["b<channel|>x", "<channel|>a"],
    takes=set(),
    min_new_tokens=0,
    chat=True,
    ends=False,
)
def test_every_cut_gives_the_plain_account(byte_tokenizer, pieces, stop, takes, min_new_tokens, chat, ends):
    ids = ids_of(byte_tokenizer, pieces)
    eos = byte_tokenizer.eos_token_ids if ends else frozenset()
    values = {"stop": tuple(stop), "min_new_tokens": min_new_tokens}
    tracker, deltas = track(byte_tokenizer, ids, takes=takes, chat=chat, eos=eos, **values)
    assert outcome(tracker) == expected(
        byte_tokenizer, ids, stop=stop, chat=chat, eos=eos, min_new_tokens=min_new_tokens
    )
    assert "".join(delta.text for delta in deltas) == tracker.text
    assert "".join(delta.thinking for delta in deltas) == tracker.thinking
    assert tuple(call for delta in deltas for call in delta.tool_calls) == tracker.tool_calls


@RELAXED
@given(pieces=pieces, stop=stops, takes=cuts, drafts=cuts)
def test_segments_are_the_text(byte_tokenizer, pieces, stop, takes, drafts):
    ids = ids_of(byte_tokenizer, pieces)
    _, deltas = track(byte_tokenizer, ids, takes=takes, drafts=drafts, stop=tuple(stop))
    for delta in deltas:
        assert "".join(segment.text for segment in delta.segments) == delta.text
        origins = [segment.is_draft for segment in delta.segments]
        assert all(one != other for one, other in pairwise(origins))


@RELAXED
@given(data=st.data(), text=st.text(min_size=1, max_size=20))
def test_real_tokens_whole_text_and_any_cut(hub_tokenizer, data, text):
    """A byte-level vocabulary: tokens hold parts of characters, words, and whole names of special tokens."""
    ids = hub_tokenizer.encode(text)
    noise = st.lists(st.integers(0, hub_tokenizer.vocab_size - 1), max_size=8)
    ids = [*ids, *data.draw(noise)]
    takes, stop = data.draw(cuts), data.draw(stops)
    tracker, deltas = track(hub_tokenizer, ids, takes=takes, stop=tuple(stop))
    assert outcome(tracker) == expected(hub_tokenizer, ids, stop=stop)
    assert "".join(delta.text for delta in deltas) == tracker.text


# Cases


def test_a_character_in_pieces_comes_whole(byte_tokenizer):
    ids = list("a🙂é".encode())
    _, deltas = track(byte_tokenizer, ids, takes=range(len(ids)))
    assert [delta.text for delta in deltas] == ["a", "", "", "", "🙂", "", "é", ""]


def test_a_partial_stop_is_held_back_and_released(byte_tokenizer):
    ids = byte_tokenizer.encode("xENy ENE")
    _, deltas = track(byte_tokenizer, ids, takes=range(len(ids)), stop=("END",))
    assert [delta.text for delta in deltas] == ["x", "", "", "ENy", " ", "", "", "EN", "E"]


def test_a_stop_across_tokens_and_beside_a_special_token(byte_tokenizer):
    ids = byte_tokenizer.encode("ab<turn|>cd")
    tracker, _ = track(byte_tokenizer, ids, takes=range(9), stop=("b<turn|>c",))
    assert (tracker.text, tracker.finish_reason, tracker.stop_match) == ("a", "stop", "b<turn|>c")
    assert tracker.token_ids == tuple(ids[:4])
    assert tracker.raw_text == "ab<turn|>c"


def test_a_limit_inside_a_character_shows_the_replacement(byte_tokenizer):
    tracker, _ = track(byte_tokenizer, list("é".encode()), max_new_tokens=1)
    assert (tracker.finish_reason, tracker.text) == ("length", "\N{REPLACEMENT CHARACTER}")


def test_the_context_ends_it(byte_tokenizer):
    request = TokenRequest(
        prompt_token_ids=(1, 2),
        settings=GenerationSettings(max_new_tokens=9),
        seed=0,
        speculate=False,
        num_speculative_tokens=0,
        eos_token_ids=frozenset(),
        max_total_tokens=4,
    )
    tracker = OutputTracker(byte_tokenizer, request, parse_chat=False)
    assert [tracker.push(token_id, is_draft=False) for token_id in (65, 66)] == [None, "context"]


def test_stop_token_ids(byte_tokenizer):
    tracker, _ = track(byte_tokenizer, list(b"abcd"), stop_token_ids=(ord("c"),))
    assert (tracker.finish_reason, tracker.stop_match, tracker.text) == ("stop", ord("c"), "abc")


@pytest.mark.parametrize("text", ["<|tool_call>call:f{x:1", "<|tool_call>nonsense<tool_call|>"])
def test_a_call_that_is_none_is_text(byte_tokenizer, text):
    tracker, _ = track(byte_tokenizer, byte_tokenizer.encode(text))
    assert tracker.tool_calls == ()
    assert tracker.text == text.replace("<|tool_call>", "").replace("<tool_call|>", "")


def test_brackets_that_are_not_special(byte_tokenizer):
    """Qwen's ``<think>`` is an added token, but not marked special: an unfinished character before it is not lost."""

    class Named:
        special_token_ids = frozenset()
        vocab_size = 302

        def token_id(self, token):
            return {"<think>": 300, "</think>": 301}.get(token)

        def token_bytes(self, token_id):
            return {300: b"<think>", 301: b"</think>"}.get(token_id) or bytes([token_id])

    tracker, _ = track(Named(), [0x61, 0xC3, 300, *b"why", 301, 0x62])
    assert (tracker.text, tracker.thinking) == ("a\N{REPLACEMENT CHARACTER}b", "why")


@pytest.mark.parametrize(("piece", "text"), [("b", "ab"), ("<turn|>", "a")])
def test_the_token_that_stops_is_text_unless_it_is_special(byte_tokenizer, piece, text):
    """A stop string is removed from the text, a stop token is not."""
    ids = ids_of(byte_tokenizer, ["a", piece, "a"])
    (stop,) = ids_of(byte_tokenizer, [piece])
    tracker, _ = track(byte_tokenizer, ids, stop_token_ids=(stop,))
    assert (tracker.finish_reason, tracker.stop_match) == ("stop", stop)
    assert (tracker.token_ids, tracker.text, tracker.raw_text) == (tuple(ids[:2]), text, "a" + piece)
    tracker, _ = track(byte_tokenizer, ids, stop=(piece,))
    assert (tracker.token_ids, tracker.text, tracker.raw_text) == (tuple(ids[:2]), "a", "a" + piece)
