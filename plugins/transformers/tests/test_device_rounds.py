"""Rounds as they run on a GPU, with steps that are not captured but run: the same tokens as step by step."""

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor

import polydraft
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft._measuring.timed import TimedEngine  # noqa: E402
from polydraft._session.session import Session  # noqa: E402
from polydraft.contract import GenerationSettings, TokenRequest  # noqa: E402
from polydraft.sampling._sampler import RuleSampler  # noqa: E402
from polydraft_transformers import device_rounds, kv_cache, prompt_end, step_attention, step_products  # noqa: E402
from polydraft_transformers.array_ops import TorchOps  # noqa: E402

PROMPT = [2, *(300 + (7 * i) % 600 for i in range(50))]
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "min_p": {"temperature": 0.8, "min_p": 0.1},
    "sorted": {"temperature": 1.3, "top_k": 40, "top_p": 0.9},
}


class Again:
    """In place of a captured step: runs it, and gives its results where the last ones were."""

    def __init__(self, function, inputs, neighbour=None):
        self._function = function
        self._outputs = None
        for _ in range(2):  # as the warm-up does
            function(*[given.clone() for given in inputs])

    def __call__(self, *inputs):
        outputs = self._function(*[given.clone() for given in inputs])
        if self._outputs is None:
            self._outputs = tuple(found.clone() for found in outputs)
        for kept, found in zip(self._outputs, outputs, strict=True):
            kept.copy_(found)
        return self._outputs


@pytest.fixture
def loaded(monkeypatch):
    """Loads a pair: ``rounds=True`` runs it as on a GPU."""
    monkeypatch.setattr(kv_cache, "Captured", Again)
    monkeypatch.setattr(device_rounds, "Captured", Again)
    monkeypatch.setattr(prompt_end, "Captured", Again)
    ran = []
    run = device_rounds.Lane.run

    def recorded(self, *arguments):
        ahead = self._rounds._ahead
        found = run(self, *arguments)
        was_ahead = ahead is not None and found is not None and found.hidden.data_ptr() == ahead.hidden.data_ptr()
        ran.append((found, was_ahead))
        return found

    monkeypatch.setattr(device_rounds.Lane, "run", recorded)

    @contextlib.contextmanager
    def load(pair, *, rounds, **options):
        given = {"backend": "transformers", "device": "cpu", "dtype": "float32", "num_speculative_tokens": 4}
        with polydraft.load(f"builtin:{pair}", **{**given, **options}) as session:
            target = session.engine.target
            target.captures = target.runs_rounds = rounds
            ran.clear()
            session.rounds_ran = ran
            yield session

    return load


def outputs(session, settings, **given):
    found = session.generate(PROMPT, **{"max_new_tokens": 50, "ignore_eos": True, "seed": 3, **settings, **given})
    stats = found.stats
    return found.token_ids, stats.num_draft_tokens, stats.num_accepted_tokens


@pytest.mark.parametrize(("pair", "name"), [("tiny-e2b", "greedy"), ("tiny-e2b", "sorted"), ("tiny-26b", "min_p")])
def test_rounds_give_the_tokens_of_single_steps(loaded, pair, name):
    settings = SETTINGS[name]
    with loaded(pair, rounds=False) as session:
        wanted = [outputs(session, settings, speculate=way) for way in ("on", "off")]
    with loaded(pair, rounds=True) as session:
        for way, expected in zip(("on", "off"), wanted, strict=True):
            session.rounds_ran.clear()
            assert outputs(session, settings, speculate=way) == expected
            found, ahead = zip(*session.rounds_ran, strict=True)
            assert all(found)
            # All but the first ones ran before they were asked for, and the last ones, which are shorter.
            assert sum(ahead) >= len(ahead) - 6


@pytest.mark.parametrize("chance", [0.0, 0.8, 1.0])
def test_synthetic_acceptance_lets_rounds_run_ahead(loaded, chance):
    with loaded("tiny-e2b", rounds=True) as session:
        engine = TimedEngine(session.engine, split=False, synthetic_acceptance=chance)
        drawn = Session(engine, session.running, session._capabilities)
        stats = drawn.generate(PROMPT, max_new_tokens=200, ignore_eos=True, seed=1).stats
        found, ahead = zip(*session.rounds_ran, strict=True)
        assert all(found)
        assert sum(ahead) >= len(ahead) - 6
        tried = stats.num_drafts + sum(stats.accepted_per_position[:-1])
        assert stats.num_accepted_tokens / tried == pytest.approx(chance, abs=0.1)
        # Others of the engine accept by the rule.
        wanted = outputs(session, SETTINGS["greedy"], speculate="off")
        assert outputs(session, SETTINGS["greedy"], speculate="on")[0] == wanted[0]


@pytest.mark.parametrize("speculate", ["on", "off"])
def test_rounds_that_run_in_one_piece_are_split(loaded, speculate):
    with loaded("tiny-e2b", rounds=True) as session:
        engine = TimedEngine(session.engine, split=True, synthetic_acceptance=None)
        timed = Session(engine, session.running, session._capabilities)
        given = {"max_new_tokens": 40, "ignore_eos": True, "speculate": speculate}
        assert timed.generate(PROMPT, **given).token_ids == session.generate(PROMPT, **given).token_ids
        parts = engine.parts()
        assert min(parts.verify, parts.choose) > 0
        assert parts.draft + parts.verify + parts.choose == pytest.approx(parts.engine)
        assert (parts.draft > parts.engine / 10) == (speculate == "on")


@pytest.fixture
def interpreted(device, small, monkeypatch):
    """Kernels run in the interpreter from now on; ``definitions()``: no longer."""
    if not small:
        pytest.skip("the conformance suite runs sessions on a GPU")
    # Fewer programs: each takes a millisecond.
    monkeypatch.setattr(step_attention, "_PARTS", 2)
    return lambda: monkeypatch.setattr(step_products, "_DEVICE", "cuda")


@pytest.mark.parametrize(("pair", "name"), [("tiny-e2b", "sorted"), ("tiny-26b", "min_p")])
def test_sessions_on_kernels_give_the_tokens_of_definitions(loaded, interpreted, pair, name):
    given = {**SETTINGS[name], "max_new_tokens": 6}
    with loaded(pair, rounds=True) as session:
        found = [outputs(session, given, speculate=way) for way in ("on", "off")]
        assert all(ran for ran, _ in session.rounds_ran)
    interpreted()
    with loaded(pair, rounds=True) as session:
        assert [outputs(session, given, speculate=way) for way in ("on", "off")] == found


def test_the_recorded_end_of_a_prompt_gives_the_same_bits(loaded, interpreted, monkeypatch):
    recorded = []
    monkeypatch.setattr(prompt_end, "Captured", lambda *given: recorded.append(Again(*given)) or recorded[-1])
    prompts = [range(300, 300 + length) for length in (9, 30, 9, 12)]
    logits = {}
    with loaded("tiny-e2b", rounds=True) as session:
        for records in (False, True):
            session.engine.target.runs_rounds = records
            for number, prompt in enumerate(prompts):  # the end of the first one is not recorded
                with contextlib.closing(session.engine.open_sequence()) as sequence:
                    step = sequence.prefill(list(prompt), sampler_of(prompt), keep_logits=True)
                    logits[records, number] = step.logits.numpy()
    assert len(recorded) == 1
    for number in range(len(prompts)):
        assert (logits[False, number] == logits[True, number]).all()


def sampler_of(prompt, **settings):
    return RuleSampler(
        TorchOps(),
        TokenRequest(
            prompt_token_ids=tuple(prompt),
            settings=GenerationSettings(**settings),
            seed=5,
            speculate=True,
            num_speculative_tokens=4,
            eos_token_ids=frozenset(),
            max_total_tokens=10**6,
        ),
    )


@pytest.mark.parametrize("exactness", ["standard", "bitwise"])
def test_whatever_is_asked_next(loaded, exactness):
    """Rounds of any k, steps of other tokens than the drafts, and going back: as without rounds that run ahead."""
    lots = random.Random(exactness)
    start = 240  # the steps cross the end of a span
    prompt = [2, *lots.choices(range(300, 900), k=start - 1)]
    with loaded("tiny-e2b", rounds=True, exactness=exactness) as session:
        target = session.engine.target
        sequences = []
        for rounds in (True, False):
            target.runs_rounds = rounds
            sequence = session.engine.open_sequence()
            sampler = sampler_of(prompt, temperature=1.0)
            newest = sequence.prefill(prompt, sampler).token_ids[0]
            sequences.append((sequence, sampler))
        for _ in range(40):
            k = lots.choice([4, 4, 4, 4, 2, 0])
            proposals = [sequence.propose(newest, k, sampler).token_ids for sequence, sampler in sequences]
            assert proposals[0] == proposals[1]
            drafts = proposals[0]
            wanted = len(drafts)
            if drafts and lots.random() < 0.15:
                drafts = [*drafts[:-1], 7]
            if lots.random() < 0.1:
                drafts = drafts[:1]
            before = sequences[0][0].length
            chosen = [sequence.verify([newest, *drafts], sampler).token_ids for sequence, sampler in sequences]
            assert chosen[0] == chosen[1]
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == chosen[0][accepted]:
                accepted += 1
            newest = chosen[0][accepted]
            if lots.random() < 0.1:  # the caller goes back to before the step
                accepted, newest = -1, lots.randrange(300, 900)
            assert wanted in (0, k)
            for sequence, _ in sequences:
                sequence.rollback(before + 1 + accepted)
        for sequence, _ in sequences:
            sequence.close()
    assert any(found for found, _ in session.rounds_ran)
    assert any(ahead for _, ahead in session.rounds_ran)


def test_the_host_takes_part_where_it_must(loaded):
    """Settings that look at earlier tokens or name tokens that are still to come; afterwards the device goes on."""
    cases = (
        ({"repetition_penalty": 1.3}, {False}),
        ({"logprobs": 2}, {False}),
        ({"forced_token_ids": {20: 500}}, {False, True}),
        ({"min_new_tokens": 12}, {False, True}),
    )
    given = [{"temperature": 1.0, "max_new_tokens": 30, **settings} for settings, _ in cases]
    with loaded("tiny-e2b", rounds=False) as session:
        wanted = [outputs(session, settings) for settings in given]
    with loaded("tiny-e2b", rounds=True) as session:
        for settings, expected, (_, parts) in zip(given, wanted, cases, strict=True):
            session.rounds_ran.clear()
            session.engine.target._free.clear()  # what stands in for captures holds on to its sequence
            assert outputs(session, settings) == expected
            assert {found is not None for found, _ in session.rounds_ran} == parts


def test_sequences_that_share_rounds(loaded):
    """Prompts of other lengths, two kinds of choices, outputs of other lengths: each as if it were alone."""
    prompts = [[2, *(300 + (number + 7 * i) % 600 for i in range(40 + 13 * number))] for number in range(5)]
    calls = [
        (prompt, {**settings, "max_new_tokens": 30 + 5 * number, "ignore_eos": True, "seed": number})
        for number, prompt in enumerate(prompts)
        for settings in (SETTINGS["greedy"], {"temperature": 1.0})
    ]
    with loaded("tiny-e2b", rounds=False) as session:
        wanted = [session.generate(prompt, **given).token_ids for prompt, given in calls]
        many = session.generate_many(prompts, max_new_tokens=20, temperature=1.0, seed=3)
    with loaded("tiny-e2b", rounds=True) as session:
        with ThreadPoolExecutor(len(calls)) as threads:
            found = [threads.submit(session.generate, prompt, **given) for prompt, given in calls]
        assert [call.result().token_ids for call in found] == wanted
        again = session.generate_many(prompts, max_new_tokens=20, temperature=1.0, seed=3)
        assert [result.token_ids for result in again] == [result.token_ids for result in many]
        (rounds,) = session.engine._rounds.values()
        assert max(lanes for lanes, _, _ in rounds._recorded) >= 4


def turns_of(session, number):
    """Two turns; the second goes on with the first one's answer: their tokens, and how many of it are reused."""
    given = {**SETTINGS["sorted"], "max_new_tokens": 15, "ignore_eos": True, "seed": number}
    first = [2, *(300 + (number + 7 * i) % 600 for i in range(60 + 13 * number))]
    answer = session.generate(first, **given)
    second = [*first, *answer.token_ids, *range(400, 420)]
    again = session.generate(second, **given)
    return [*answer.token_ids, *again.token_ids], again.stats.num_reused_tokens - len(first)


def test_turns_leave_their_rounds_and_join_again(loaded):
    """Conversations at the same time: each kept sequence gives its buffers back, and takes others for its next turn."""
    with loaded("tiny-e2b", rounds=False, prefix_cache_bytes=0) as session:
        wanted = [turns_of(session, number)[0] for number in range(4)]
    with loaded("tiny-e2b", rounds=True) as session:
        with ThreadPoolExecutor(4) as threads:
            found = [*threads.map(lambda number: turns_of(session, number), range(4))]
        assert [tokens for tokens, _ in found] == wanted
        # All of the answer; its newest token has been run if it was an accepted draft.
        assert all(14 <= reused <= 15 for _, reused in found)
        (rounds,) = session.engine._rounds.values()
        assert max(lanes for lanes, _, _ in rounds._recorded) >= 2


def test_a_guided_call_between_others(loaded):
    """What a grammar must match is chosen on the host; calls without one go on in rounds beside it."""
    pytest.importorskip("llguidance", reason="needs the extra structured")
    plain = {"temperature": 0.0, "max_new_tokens": 25, "ignore_eos": True}
    guided = {"guided": {"regex": "[a-z]{3,9} [0-9]{2}"}, "max_new_tokens": 40, "seed": 3}
    with loaded("tiny-e2b", rounds=False) as session:
        wanted = [session.generate(PROMPT, **given).token_ids for given in (plain, guided)]
    with loaded("tiny-e2b", rounds=True) as session:
        with ThreadPoolExecutor(3) as threads:
            found = [threads.submit(session.generate, PROMPT, **given) for given in (plain, guided, plain)]
        assert [call.result().token_ids for call in found] == [*wanted, wanted[0]]
        ways = {ran is not None for ran, _ in session.rounds_ran}
        assert ways == {True, False}


def test_what_is_kept_of_a_cache_finds_its_place_in_another():
    """Kernels find it by the other one's table, which says where the buffers are, before and after they grow."""
    made = [kv_cache.KvCache([None, 32], 5, torch.float32, masked=False, masks_prompts=False) for _ in range(2)]
    first, second = made
    rows = torch.randn(2, 1, 2, 70, 16)  # keys and values of 70 tokens
    for layer in range(2):
        first.make_buffers(layer, rows, 2, 16)
    first.reserve(76)
    for layer in range(2):
        for buffer, own in zip(first._buffers[layer], rows, strict=True):
            slots = torch.arange(70) if layer == 0 else torch.arange(70 - first.ring, 70) % first.ring
            buffer[:, :, slots] = own[:, :, -len(slots) :]
    first.length = 70
    first.wrote(75)
    saved = first.saved()
    assert saved.reaches(70)
    assert not saved.reaches(50)
    second.restore(saved)
    assert (second.length, second.reaches(70), second.reaches(50)) == (70, True, False)
    for size in (100, 2000):
        second.reserve(size)
        for layer, (keys, values) in second._buffers.items():
            assert second.places(layer).tolist() == [[keys.data_ptr(), values.data_ptr(), keys.shape[2]]]
            assert second.capacity >= size
            for buffer, own in zip((keys, values), first._buffers[layer], strict=True):
                stored = 70 if layer == 0 else first.ring
                assert (buffer[:, :, :stored] == own[:, :, :stored]).all()


def test_a_sequence_that_pauses_holds_up_no_other(loaded):
    with loaded("tiny-e2b", rounds=True) as session:
        paused = session.stream(PROMPT, max_new_tokens=60, ignore_eos=True, temperature=0.0)
        wanted = outputs(session, {"temperature": 0.0, "max_new_tokens": 60})[0]
        tokens = [*next(paused).token_ids, *next(paused).token_ids]
        assert outputs(session, {"temperature": 0.0, "max_new_tokens": 60})[0] == wanted
        tokens += [token for chunk in paused for token in chunk.token_ids]
        assert tuple(tokens) == tuple(wanted)


def test_a_round_that_is_not_sound(loaded):
    """What ran ahead of it leaves nothing behind: the next round is that of a sequence without rounds."""
    with loaded("tiny-e2b", rounds=True) as session:
        weight = session.engine.target.model.model.embed_tokens_per_layer.weight
        choices = []
        for value in (1.0, torch.nan):
            sequence, sampler = session.engine.open_sequence(), sampler_of(PROMPT, temperature=0.0)
            newest = sequence.prefill(PROMPT, sampler).token_ids[0]
            with torch.inference_mode():
                kept = weight[newest].clone()
                weight[newest] *= value
                drafts = sequence.propose(newest, 4, sampler).token_ids
                choices.append(sequence.verify([newest, *drafts], sampler).token_ids)
                weight[newest] = kept
            sequence.rollback(len(PROMPT))
            sequence.verify([newest] * 5, sampler)  # as the loop does: over the rows of the drafts
            sequence.rollback(len(PROMPT))
            assert sequence.verify([newest], sampler).token_ids == choices[0][:1]
        assert choices[0][0] >= 0
        assert choices[1][0] == -1
        assert choices[1] in [found.chosen for found, _ in session.rounds_ran]
