"""k that fits: the schedule's picks with times that are made up, and its rounds on the reference engine."""

import math
import random
import time
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft._loop.schedule import CallSchedule, SessionSchedule

pytest.importorskip("polydraft_reference", reason="the loop is tested on the reference engine: polydraft-reference")

LARGEST = 8
TOKENS = 128


@dataclass
class Machine:
    """Seconds of drafting and verifying, and how likely drafts are accepted."""

    draft: float
    """Per draft; a plain round takes 1."""
    row: float
    """Per further row of a step."""
    accepted: float
    """Chance of each draft, if those before it were accepted."""
    changing: float = 0.0
    """More for a step of another number of rows than the one before it."""
    catching_up: float = 0.0
    """Per token that the drafter has not followed."""
    measured: random.Random | None = None
    """Measurements are off by a few per cent, and one in fifty is many times too long; None: exact."""
    wanders: float = 0.0
    """By how much the machine's speed changes from one measurement to the next; measurements are then off by more."""
    speed: float = 0.0
    picks: int = 0
    one_launch: bool = False
    """Whether drafting and verifying are measured as one."""

    def run(self, call, seed, k=None):
        """Seconds for a call's tokens after the first, with a fixed k or a schedule's."""
        draw = random.Random(seed)
        seconds, missed, left, rows, again = 0.0, 20, TOKENS - 1, 0, 0
        while left > 0:
            if again:
                again -= 1
            elif k is None:
                self.picks += 1
                picked, again = call.pick(left)
            drafted = min(picked if k is None else k, left - 1)
            accepted = 0
            while draw.random() < self.accepted and accepted < drafted:
                accepted += 1
            drafting = self.draft * drafted + self.catching_up * missed if drafted else 0.0
            verifying = 1 + self.row * drafted + (self.changing if drafted + 1 != rows else 0.0)
            rows = drafted + 1
            missed = 0 if drafted else missed + 1
            seconds += drafting + verifying
            left -= accepted + 1
            if k is None and not again:
                if self.one_launch:
                    drafting, verifying = 0.0, drafting + verifying
                call.count(drafted, accepted, self.seen(drafting), self.seen(verifying))
        return seconds

    def seen(self, seconds):
        if self.measured is None:
            return seconds
        if self.wanders:
            self.speed = 0.97 * self.speed + self.measured.gauss(0, self.wanders)
            return seconds * math.exp(self.speed + self.measured.gauss(0, 3 * self.wanders))
        spike = self.measured.uniform(3, 12) if self.measured.random() < 0.02 else 1
        return seconds * spike * self.measured.uniform(0.9, 1.1)

    def fixed(self, calls):
        """Seconds of each fixed k, 0 included."""
        return [sum(self.run(None, seed, k) for seed in calls) for k in range(LARGEST + 1)]

    def scheduled(self, session, calls):
        return sum(self.run(session.call(20), seed) for seed in calls)


MACHINES = {
    "drafts are cheap and right": (0.1, 0.01, 0.9),
    "drafts are cheap and often wrong": (0.1, 0.01, 0.5),
    "drafts cost a third of a step": (0.33, 0.05, 0.75),
    "rows cost as much as half a step": (0.2, 0.5, 0.85),
    "drafts are useless": (0.3, 0.05, 0.02),
    "drafts do not pay": (0.4, 0.2, 0.45),
}
CALLS = range(100, 160)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("noisy", [False, True], ids=["exact", "noisy"])
def test_near_the_best_fixed_k_and_never_slower_than_plain(name, noisy):
    machine = Machine(*MACHINES[name], measured=random.Random(7) if noisy else None)
    session = SessionSchedule(LARGEST)
    machine.scheduled(session, range(3))
    seconds, fixed = machine.scheduled(session, CALLS), machine.fixed(CALLS)
    assert seconds <= 1.05 * min(fixed)
    assert seconds <= 1.03 * fixed[0]


@pytest.mark.parametrize("name", MACHINES)
def test_rounds_that_are_one_launch(name):
    machine = Machine(*MACHINES[name], measured=random.Random(7), one_launch=True)
    session = SessionSchedule(LARGEST)
    machine.scheduled(session, range(3))
    seconds, fixed = machine.scheduled(session, CALLS), machine.fixed(CALLS)
    assert seconds <= 1.05 * min(fixed)
    assert seconds <= 1.03 * fixed[0]


@pytest.mark.parametrize(("draft", "row"), [(0.4, 0.03), (0.04, 0.01), (0.25, 0.35)])
def test_texts_of_many_kinds_on_a_machine_whose_speed_wanders(draft, row):
    """What other programs do to one measurement is not what the next one of that size takes."""
    losses, over_plain = [], []
    for seed in range(6):
        noise = random.Random(seed)
        session = SessionSchedule(LARGEST)
        for accepted in (0.85, 0.55, 0.7, 0.25):
            machine = Machine(draft, row, accepted, measured=noise, wanders=0.05)
            calls = range(40, 44)
            seconds, fixed = machine.scheduled(session, calls), machine.fixed(calls)
            losses.append(seconds / min(fixed))
            over_plain.append(seconds / fixed[0])
    assert sum(losses) / len(losses) <= 1.04
    assert max(over_plain) <= 1.08


@pytest.mark.parametrize("accepted", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("noisy", [False, True], ids=["exact", "noisy"])
def test_a_change_of_k_must_pay_for_itself(accepted, noisy):
    """llama.cpp plans a step of another size anew: k that changes from round to round took longer than any k."""
    machine = Machine(0.24, 0.1, accepted, changing=0.4, measured=random.Random(5) if noisy else None)
    session = SessionSchedule(LARGEST)
    machine.scheduled(session, range(3))
    seconds, fixed = machine.scheduled(session, CALLS), machine.fixed(CALLS)
    assert seconds <= 1.06 * min(fixed)
    assert seconds <= 1.03 * fixed[0]


def test_a_first_call_with_a_useless_drafter_loses_little():
    machine = Machine(0.3, 0.05, 0.02)
    seconds = [machine.run(SessionSchedule(LARGEST).call(20), seed) for seed in range(20)]
    assert sum(seconds) / 20 <= 1.04 * (TOKENS - 1)


@pytest.mark.parametrize("noisy", [False, True], ids=["exact", "noisy"])
def test_where_no_draft_can_pay_it_is_hardly_tried_or_thought_about(noisy):
    """tiny-e2b on one thread of llama.cpp: thinking takes a tenth of a step, and a trial two steps."""
    machine = Machine(0.7, 0.45, 0.85, changing=0.6, measured=random.Random(7) if noisy else None)
    session = SessionSchedule(LARGEST)
    machine.scheduled(session, range(10))
    machine.picks = 0
    assert machine.scheduled(session, CALLS) <= 1.006 * machine.fixed(CALLS)[0]
    assert machine.picks <= 14 * len(CALLS)


def test_a_change_of_text_is_noticed():
    session = SessionSchedule(LARGEST)
    hard, easy = Machine(0.15, 0.02, 0.1), Machine(0.15, 0.02, 0.95)
    hard.scheduled(session, range(6))
    call = session.call(20)
    fixed = min(easy.fixed(range(40, 41)))
    assert easy.run(call, 40) <= 1.35 * fixed  # most of the gain, in the very next call
    assert hard.scheduled(session, range(50, 53)) <= 1.06 * min(hard.fixed(range(50, 53)))


def test_easy_and_hard_stretches_are_told_apart():
    """A stretch of twelve right drafts follows each of twelve wrong ones: no single k fits both."""

    def run(call, k=None):
        seconds, at, last, again = 0.0, 0, 400, 0
        while at < last:
            if again:
                again -= 1
            elif k is None:
                picked, again = call.pick(last - at)
            drafted = min(picked if k is None else k, last - at - 1)
            accepted = 0
            while accepted < drafted and (at + accepted) % 24 >= 12:
                accepted += 1
            drafting, verifying = 0.2 * drafted, 1 + 0.1 * drafted
            seconds += drafting + verifying
            at += accepted + 1
            if k is None and not again:
                call.count(drafted, accepted, drafting, verifying)
        return seconds

    session = SessionSchedule(LARGEST)
    run(session.call(20))
    assert run(session.call(20)) <= 0.92 * min(run(None, k) for k in range(LARGEST + 1))


def test_slow_first_measurements_are_forgotten():
    session = SessionSchedule(LARGEST)
    machine = Machine(0.1, 0.02, 0.9)
    call = session.call(20)
    for number in range(6):  # kernels are built, pages are read
        k, _ = call.pick(100)
        call.count(k, k, 1.0 * k, 20.0 if number % 2 else 1 + 0.02 * k)
    machine.scheduled(session, range(20))
    assert machine.scheduled(session, CALLS) <= 1.06 * min(machine.fixed(CALLS))


def test_other_processes_do_not_shorten_drafts():
    """On a busy machine a long step is interrupted more often than a short one, for longer than either takes."""
    interrupted = random.Random(3)

    class Busy(Machine):
        def seen(self, seconds):
            return seconds + (interrupted.uniform(4, 12) if interrupted.random() < seconds / 6 else 0)

    machine, session = Busy(0.01, 0.2, 0.95), SessionSchedule(LARGEST)
    machine.scheduled(session, range(20))
    assert machine.scheduled(session, CALLS) <= 1.1 * min(machine.fixed(CALLS))


def test_the_drafter_catches_up_only_if_that_pays():
    """A draft model would have to run a long prompt first, for a handful of tokens."""
    session = SessionSchedule(LARGEST)
    machine = Machine(0.2, 0.02, 0.9, catching_up=0.05)
    machine.scheduled(session, range(4))
    assert session.call(2000).pick(40)[0] == 0
    assert session.call(20).pick(1000)[0] > 0


def test_room_and_least():
    session = SessionSchedule(LARGEST)
    Machine(0.1, 0.01, 0.95).scheduled(session, range(3))
    call = session.call(5)
    assert call.pick(1) == (0, 0)
    assert call.pick(2)[0] <= 1
    assert call.pick(3)[0] <= 2
    Machine(0.5, 0.5, 0.0).scheduled(session, range(9))
    least = session.call(5, 1)
    picked = [least.pick(50)[0] for _ in range(40)]
    assert min(picked) == 1
    assert picked.count(1) >= 20


def test_weights_stay_finite():
    session = SessionSchedule(LARGEST)
    call = session.call(5)
    for _ in range(5000):
        k, _ = call.pick(100)
        call.count(k, k // 2, 0.1 * k, 1.0)
    assert all(0 <= chance <= 1 for chance in session.acceptance().chances(LARGEST))


# On the reference engine ---------------------------------------------------------------------------------------------


class Drawn:
    """A schedule that picks any k, drawn by chance."""

    def __init__(self, seed, largest):
        self.random, self.largest, self.picked, self.rounds = random.Random(seed), largest, [], 0

    def call(self, prompt_tokens, least):
        return self

    def pick(self, left):
        assert len(self.picked) == self.rounds
        k = self.random.choice((0, 0, self.random.randint(0, self.largest)))
        again = 0 if k else min(self.random.choice((0, 0, 1, 5)), left - 1)
        self.picked += [min(k, left - 1)] * (1 + again)
        return k, again

    def count(self, drafted, accepted, draft_seconds, verify_seconds, between):
        assert drafted <= self.picked[-1]
        self.rounds = len(self.picked)
        assert min(draft_seconds, verify_seconds, between) >= 0


prompts = st.lists(st.integers(0, 278), min_size=1, max_size=40)
drafters = st.sampled_from([("mtp", 0.3), ("mtp", 0.9), ("draft-model", None), ("ngram", None)])
samplings = st.sampled_from(
    [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "seed": 2**62, "top_p": 0.9, "repetition_penalty": 1.2}]
)


@given(drafter=drafters, prompt=prompts, sampling=samplings, seed=st.integers(0, 2**32), bitwise=st.booleans())
def test_any_schedule_gives_the_tokens_of_plain_decoding(kit, drafter, prompt, sampling, seed, bitwise):
    kind, agreement = drafter
    session = kit.shared(kind, LARGEST, agreement, picks_k=True, exactness="bitwise" if bitwise else "standard")
    drawn = session.schedule = Drawn(seed, LARGEST)
    found = session.generate(prompt, max_new_tokens=60, ignore_eos=True, **sampling)
    plain = session.generate(prompt, max_new_tokens=60, ignore_eos=True, speculate="off", **sampling)
    assert found.token_ids == plain.token_ids
    stats = found.stats
    assert stats.num_target_steps == len(drawn.picked)
    if kind != "ngram":
        ks = [k for k in drawn.picked if k]
        assert stats.num_drafts == len(ks)
        assert stats.num_draft_tokens == sum(ks)
        assert stats.drafted_per_position == tuple(sum(k > at for k in ks) for at in range(max(ks, default=0)))


@pytest.mark.parametrize("kind", ["mtp", "draft-model"])
def test_drafts_after_plain_rounds_are_those_of_a_fresh_drafter(kit, kind):
    """A drafter that agrees with the target always is right after any number of plain rounds."""
    session = kit.session(kind, LARGEST, 1.0 if kind == "mtp" else None, picks_k=True)
    fixed = kit.session(kind, LARGEST, 1.0 if kind == "mtp" else None)
    session.schedule = Drawn(11, LARGEST)
    kit.logs.clear()
    for _ in range(4):
        session.generate([65, 66, 67], max_new_tokens=60, ignore_eos=True)
    found = [log for log in kit.logs if log.proposals]
    assert found or kind == "draft-model"
    tokens = fixed.generate([65, 66, 67], max_new_tokens=60, ignore_eos=True).token_ids
    if kind == "mtp":
        for log in found:
            accepted = log.accepted(len(tokens))
            drafted = [len(run) - 1 for run, _ in log.steps if len(run) > 1]
            assert accepted == drafted


def test_rejection_sampling_keeps_k(kit):
    """Its tokens depend on k, which must not depend on time: a seed repeats them."""
    session = kit.session("mtp", LARGEST, 0.5, picks_k=True)
    kit.logs.clear()
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 5, "acceptance": "rejection", "ignore_eos": True}
    first, second = (session.generate([65, 66], **settings) for _ in range(2))
    assert first.token_ids == second.token_ids
    for log in kit.logs:
        assert {k for k, _ in log.proposals[:-4]} == {session.running.num_speculative_tokens}


def test_speculate_on_drafts_in_every_round(kit):
    session = kit.session("mtp", LARGEST, 0.0, picks_k=True)
    for _ in range(2):
        stats = session.generate([65, 66], max_new_tokens=80, speculate="on", ignore_eos=True).stats
        assert stats.num_target_steps - stats.num_drafts <= 1  # none fits before the last token


@pytest.mark.parametrize("verified", [False, True])
def test_drafts_that_the_target_has_run_took_its_time(kit, monkeypatch, verified):
    class Waits(kit.sequence_class):
        def propose(self, newest, k, sampler, *, keep_logits=False):
            time.sleep(0.002)
            return replace(super().propose(newest, k, sampler, keep_logits=keep_logits), verified=verified)

    counted = []
    monkeypatch.setattr(CallSchedule, "count", lambda call, drafted, *given: counted.append((drafted, *given[1:3])))
    kit.session("mtp", LARGEST, 0.5, Waits, picks_k=True).generate([65, 66], max_new_tokens=30, ignore_eos=True)
    found = [(draft, verify) for drafted, draft, verify in counted if drafted]
    assert found
    for draft, verify in found:
        assert (draft < 0.001 < verify) if verified else draft > 0.001


def test_a_fixed_k_is_fixed(kit):
    session = kit.session("mtp", 4, 0.0)
    assert session.schedule is None
    stats = session.generate([65, 66], max_new_tokens=80, ignore_eos=True).stats
    assert stats.drafted_per_position[0] == stats.num_drafts == stats.num_target_steps - 1


def test_an_engine_with_its_own_loop_says_that_k_is_fixed(kit):
    from polydraft._load import open_session
    from scripted_engines import Whole

    class Made(type(kit.backend)):
        def load_engine(self, request):
            made = Whole(max_speculative_tokens=8, context_length=64)
            made.picks_k = picks_k
            return made

    picks_k = False
    with open_session(Made(), kit.request("ngram")) as session:
        assert session.running.max_speculative_tokens is None
        assert "k is 2 in all rounds" in session.running.notes[-1]
    picks_k = True
    with open_session(Made(), kit.request("ngram")) as session:
        assert session.running.max_speculative_tokens == 8
        assert not session.running.notes
