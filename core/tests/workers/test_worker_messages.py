"""Frames and messages: cut anywhere, and nothing that Python says is lost."""

import math

import pytest
from polydraft._workers.messages import Answer, FrameError, Frames, LogLine, Question, RoundDone, frame


def test_frames_may_be_cut_anywhere():
    sent = [
        RoundDone(call=1, token_ids=(1, 2), drafted=1, accepted=None, seconds=0.25, spelled={7: "\xff\x00"}),
        RoundDone(call=1, token_ids=(3,), drafted=0, accepted=0, seconds=0, logprobs=((3, -math.inf, ((4, -0.5),)),)),
        Answer(number=3, value={"a": [1.5, None, "ü"]}),
    ]
    data = b"".join(map(frame, sent))
    for size in (1, 3, 7, len(data)):
        frames = Frames("worker")
        found = [one for at in range(0, len(data), size) for one in frames.feed(data[at : at + size])]
        assert found == sent


def test_names_that_are_not_utf_8_arrive():
    question = Question(number=1, name="refuse", arguments={"path": "/models/\udcff"})
    assert list(Frames("app").feed(frame(question))) == [question]


@pytest.mark.parametrize("data", [b"Hello, I am no frame", b"\0\0\0\x02{}", b"\0\0\0\x03abc"])
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(FrameError):
        list(Frames("worker").feed(data))


def test_messages_of_the_other_side_are_refused():
    line = LogLine(name="a", level=20, message="", created=0, path="", line=0)
    with pytest.raises(FrameError):
        list(Frames("app").feed(frame(line)))
