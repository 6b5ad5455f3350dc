"""Whatever an engine returns or raises, a session survives it: a typed error, and the next call works."""

import asyncio
import itertools
import signal
import threading
import warnings

import numpy as np
import pytest
from polydraft._session.session import Session
from polydraft.contract import GenerationStats, Proposal, Round, Step, TokenLogprobs
from polydraft.errors import EngineError, LogitsProcessorError, NonFiniteLogitsError, PluginError, PolydraftError
from scripted_engines import CAPABILITIES, Stepping, Whole, emit, good_rounds

PROMPT = "abc"
GIVEN = {"max_new_tokens": 9}


class Odd(BaseException):
    """No ``Exception``: what must not be caught by chance."""


class OddId:
    def __index__(self):
        raise RuntimeError


def raiser(error):
    def function(*_, **__):
        raise error

    return function


def after_one(fault):
    """Rounds of which the second is at fault."""

    def rounds(generation):
        yield emit(generation)
        yield fault(generation)

    return rounds


BAD_IDS = [1.5, "a", None, True, -1, 16, 10**30, np.float32(1), np.bool_(True), float("nan"), [1], b"a", OddId()]
WHOLE = {
    **{f"id {bad!r:.20}": after_one(lambda generation, bad=bad: emit(generation, [1, bad])) for bad in BAD_IDS},
    "ids a string": after_one(lambda generation: emit(generation, "11")),
    "ids None": after_one(lambda generation: emit(generation, None)),
    "ids a set": after_one(lambda generation: emit(generation, {1})),
    "no ids": after_one(lambda generation: emit(generation, ())),
    "accepted without end": after_one(lambda generation: emit(generation, drafted=1, accepted=2)),
    "negative counts": after_one(lambda generation: emit(generation, drafted=-1)),
    "count 1.5": after_one(lambda generation: emit(generation, drafted=2, accepted=1.5)),
    "seconds NaN": after_one(lambda generation: emit(generation, seconds=float("nan"))),
    "seconds text": after_one(lambda generation: emit(generation, seconds="1")),
    "logprobs short": after_one(
        lambda generation: emit(generation, [1, 1], logprobs=[TokenLogprobs.model_construct()])
    ),
    "logprobs None": after_one(lambda generation: emit(generation, logprobs=[None])),
    "logprobs of another": after_one(
        lambda generation: emit(generation, logprobs=[TokenLogprobs(token_id=2, logprob=-1.0)])
    ),
    "logprobs NaN": after_one(
        lambda generation: emit(generation, logprobs=[TokenLogprobs(token_id=1, logprob=float("nan"))])
    ),
    "listed logprobs NaN": after_one(
        lambda generation: emit(
            generation, logprobs=[TokenLogprobs(token_id=1, logprob=-1.0, top=((1, -1.0), (2, float("nan"))))]
        )
    ),
    "report nonsense": after_one(lambda generation: generation.report("fast")),
    "report negative": after_one(
        lambda generation: generation.report(GenerationStats.model_construct(num_tokens=-1)),
    ),
    "a round of its own": after_one(
        lambda generation: Round(token_ids=(1,), num_draft_tokens=0, num_accepted_tokens=0)
    ),
    "yields None": after_one(lambda generation: None),
    "yields the first again": lambda generation: itertools.repeat(emit(generation)),
    "two rounds at once": after_one(lambda generation: (emit(generation), emit(generation))[0]),
    "ends early": lambda generation: itertools.islice(good_rounds(generation), 3),
    "keeps a round": after_one(lambda generation: emit(generation) and emit(generation)),
    "no rounds": lambda generation: iter(()),
    "returns None": lambda generation: None,
    "returns a list": lambda generation: [emit(generation)],
    "StopIteration": raiser(StopIteration()),
    "StopIteration later": after_one(raiser(StopIteration())),
    "SystemExit": raiser(SystemExit(3)),
    "SystemExit later": after_one(raiser(SystemExit(3))),
    "GeneratorExit later": after_one(raiser(GeneratorExit())),
    "BaseException later": after_one(raiser(Odd())),
    "emits after the end": after_one(lambda generation: emit(generation, [1] * 20) and emit(generation)),
}
STEPPING = {
    **{
        f"choice {bad!r:.20}": {"verify": lambda ids, *_, bad=bad, **__: Step([1, bad, 1][: len(ids)])} for bad in [2.5]
    },
    **{f"prefill {bad!r:.20}": {"prefill": lambda *_, bad=bad, **__: Step([bad])} for bad in BAD_IDS},
    **{f"draft {bad!r:.20}": {"propose": lambda *_, bad=bad, **__: Proposal([bad])} for bad in BAD_IDS},
    "no step": {"verify": lambda *_, **__: None},
    "no prefill": {"prefill": lambda *_, **__: [1]},
    "an empty prefill": {"prefill": lambda *_, **__: Step([])},
    "choices None": {"verify": lambda *_, **__: Step(None)},
    "choices a generator": {"verify": lambda *_, **__: Step(iter([1, 1, 1]))},
    "choices too many": {"verify": lambda *_, **__: Step([1] * 9)},
    "no proposal": {"propose": lambda *_, **__: [1]},
    "endless drafts": {"propose": lambda *_, **__: Proposal(itertools.repeat(1))},
    "a length that stays": {"propose": lambda *_, **__: Proposal([2]), "rollback": lambda length: None},
    "close fails": {"close": raiser(RuntimeError("no"))},
    "close exits": {"close": raiser(SystemExit())},
    "prefill exits": {"prefill": raiser(SystemExit())},
    "logits of wrong rows": {
        "prefill": lambda ids, sampler, **_: Step(*sampler.choose(np.zeros((2, 16), np.float32), len(ids), ids[-1:]))
    },
    "logits too narrow": {
        "prefill": lambda ids, sampler, **_: Step(*sampler.choose(np.zeros((1, 15), np.float32), len(ids), ids[-1:]))
    },
    "logits None": {"prefill": lambda ids, sampler, **_: Step(*sampler.choose(None, len(ids), ids[-1:]))},
}
FAULTS = [(Whole, fault) for fault in WHOLE] + [(Stepping, fault) for fault in STEPPING]


def session_of(engine):
    return Session(engine, engine.running, CAPABILITIES)


async def read(stream):
    return [chunk async for chunk in stream]


DOORS = {
    "generate": lambda session: session.generate(PROMPT, **GIVEN),
    "stream": lambda session: list(session.stream(PROMPT, **GIVEN)),
    "generate_many": lambda session: session.generate_many([PROMPT] * 2, **GIVEN),
    "agenerate": lambda session: asyncio.run(session.agenerate(PROMPT, **GIVEN)),
    "astream": lambda session: asyncio.run(read(session.astream(PROMPT, **GIVEN))),
}


def works(session):
    """Whether a call works in this thread and in another; it must not hang."""
    results = []
    thread = threading.Thread(target=lambda: results.append(session.generate(PROMPT, **GIVEN)), daemon=True)
    thread.start()
    thread.join(10)
    results.append(session.generate(PROMPT, **GIVEN))
    return [result.text for result in results] == ["b" * 9] * 2


@pytest.mark.parametrize("concurrency", ["serial", "concurrent"])
@pytest.mark.parametrize(("kind", "fault"), FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_session_survives_its_engine(kind, fault, concurrency):
    engine = kind(concurrency=concurrency)
    session = session_of(engine)
    for door in DOORS.values():
        engine.fault = (WHOLE if kind is Whole else STEPPING)[fault]
        with pytest.raises(EngineError) as caught:
            door(session)
        assert "b" * len(caught.value.partial_text) == caught.value.partial_text
        if fault == "logprobs NaN":  # more likely the model's fault
            assert isinstance(caught.value, NonFiniteLogitsError)
        else:
            assert "scripted" in str(caught.value) or caught.value.hint.startswith("This is a defect of the backend;")
        engine.fault = None
        assert works(session)
    assert not session._in_progress
    session.close()
    assert engine.closes == 1


def test_the_text_so_far_is_kept():
    engine = Whole(after_one(lambda generation: emit(generation, [2, 3, None])))
    with session_of(engine) as session:
        stream = session.stream(PROMPT, **GIVEN)
        assert next(stream).text == "b"
        with pytest.raises(EngineError, match="emitted None, which is not a token id") as caught:
            next(stream)
        assert caught.value.partial_text == stream.result.text == "bcd"
        assert list(stream) == []


def test_whole_numbers_of_other_libraries_are_token_ids():
    engine = Whole(lambda generation: iter([emit(generation, np.array([2, 3])), *()]))
    with session_of(engine) as session:
        result = session.generate(PROMPT, max_new_tokens=2)
    assert result.text == "cd"
    assert [type(token_id) for token_id in result.token_ids] == [int, int]


def test_what_follows_the_end_is_dropped_whatever_it_is():
    engine = Whole(lambda generation: iter([emit(generation, itertools.chain([1, 1], [None]))]))
    with session_of(engine) as session:
        assert session.generate(PROMPT, max_new_tokens=2).text == "bb"
        assert session.generate(PROMPT, stop_token_ids=[1]).text == "b"


@pytest.mark.parametrize("bad", [1.5, -1])
def test_the_engines_own_statistics_are_checked(bad):
    def rounds(generation):
        generation.report(GenerationStats(num_tokens=7, num_drafts=1))
        yield emit(generation)

    with session_of(Whole(rounds)) as session:
        assert session.generate(PROMPT, max_new_tokens=1).stats.num_tokens == 1, "tokens are counted"
    with pytest.raises(ValueError, match="num_drafts"):
        GenerationStats(num_tokens=1, num_drafts=bad)


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(), Odd()])
def test_an_engine_that_fails_to_close_can_be_closed_again(error):
    engine = Whole()
    session = session_of(engine)
    engine.close = raiser(error)
    with pytest.raises(EngineError, match=r"in its close\(\)"):
        session.close()
    del engine.close
    session.close()
    session.close()
    assert engine.closes == 1


def test_a_warning_that_is_an_error_does_not_keep_the_engine():
    """The monitor warns while a stream ends, here because the session is closed from inside a step."""
    engine = Stepping({"propose": lambda *_, **__: Proposal([])})
    session = session_of(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = session.stream(PROMPT, max_new_tokens=50)
        for _ in range(40):
            next(stream)
        with pytest.raises(UserWarning, match="has drafted nothing"):
            session.close()
    assert engine.closes == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("running", None),
        ("running", {"k": 1}),
        ("running", Whole().running.model_copy(update={"context_length": "long"})),
        ("running", Whole().running.model_copy(update={"context_length": 0})),
        ("tokenizer", None),
        ("tokenizer", object()),
    ],
)
def test_an_engine_of_wrong_parts_is_refused(name, value):
    engine = Whole()
    setattr(engine, name, value)
    with pytest.raises(PluginError, match="Whole breaks the contract"):
        session_of(engine)


def test_what_is_no_engine_is_refused():
    with pytest.raises(PluginError, match="neither"):
        Session(object(), Whole().running, CAPABILITIES)
    with pytest.raises(PluginError, match="capabilities"):
        Session(Whole(), Whole().running, None)
    few = Stepping(num_speculative_tokens=3)
    with pytest.raises(PluginError, match="at most 2 drafts"):
        session_of(few)


@pytest.mark.parametrize("method", ["encode", "chat", "token_bytes"])
@pytest.mark.parametrize("bad", [lambda *_, **__: None, lambda *_, **__: ["a"], raiser(KeyError("x")), raiser(Odd())])
def test_tokenizers_that_return_wrong_things(method, bad):
    engine = Whole()
    with session_of(engine) as session:
        prompt = [{"role": "user", "content": PROMPT}] if method == "chat" else PROMPT
        setattr(engine.tokenizer, method, bad)
        for door in (session.generate, session.stream):
            with pytest.raises(EngineError):
                list(door(prompt, **GIVEN))
        delattr(engine.tokenizer, method)
        assert works(session)


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(), Odd()])
def test_a_processor_that_raises(make_session, error):
    session = make_session()
    for door in DOORS.values():
        with pytest.raises(LogitsProcessorError):
            door(_WithProcessor(session, raiser(error)))
    assert session.generate(PROMPT, **GIVEN).token_ids


class _WithProcessor:
    """A session that gives every call one logits processor."""

    def __init__(self, session, processor):
        self._session, self._processor = session, processor

    def __getattr__(self, name):
        method = getattr(self._session, name)
        return lambda prompt, **given: method(prompt, logits_processor=self._processor, **given)


# The caller's own exceptions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(5), TimeoutError("handler"), Odd()])
def test_exceptions_of_a_signal_handler_reach_the_caller(error):
    def handler(*_):
        raise error

    def rounds(generation):
        yield emit(generation)
        signal.raise_signal(signal.SIGINT)
        yield emit(generation)

    engine = Whole(rounds)
    before = signal.signal(signal.SIGINT, handler)
    try:
        with session_of(engine) as session:
            with pytest.raises(type(error)) as caught:
                session.generate(PROMPT, **GIVEN)
            assert caught.value is error
            engine.fault = None
            assert works(session)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no interval timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may hit a weak reference's callback
def test_an_interrupt_at_any_moment_leaves_the_session_usable():
    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    kept = []
    try:
        for kind in (Whole, Stepping):
            with session_of(kind()) as session:
                for moment in range(1, 150, 3):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, moment / 100_000)
                        for _ in range(20):
                            session.generate(PROMPT, **GIVEN)
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    except KeyboardInterrupt as error:
                        kept.append(error)  # as an interactive interpreter keeps the last traceback
                    assert works(session)
                assert not session._in_progress
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_load_closes_what_breaks_the_contract(monkeypatch):
    from polydraft._load import open_session
    from polydraft.contract import Backend

    class Made(Backend):
        def capabilities(self):
            return CAPABILITIES

        def diagnose(self):
            raise NotImplementedError

        def load_engine(self, request):
            engine = Whole()
            engine.tokenizer = None
            made.append(engine)
            return engine

    made = []
    toys = pytest.importorskip("polydraft_reference.toys")
    with pytest.raises(PluginError, match="tokenizer"):
        open_session(Made(), toys.toy_request())
    assert made[0].closes == 1
    monkeypatch.setattr(Made, "load_engine", raiser(SystemExit()))
    with pytest.raises(PolydraftError, match="could not load"):
        open_session(Made(), toys.toy_request())
