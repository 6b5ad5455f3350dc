"""Broken models in a session: plain and speculative decoding emit the same tokens, and then the same error."""

from __future__ import annotations

import numpy as np
import pytest
from polydraft.errors import NonFiniteLogitsError, PolydraftError

PROMPT = [11, 12, 13, 14]


def spoiling(kit, position):
    """Sequences whose logits for ``position`` (absolute) are NaN; drafters see nothing of it."""

    class Spoiling(kit.sequence_class):
        def choose(self, logits, token_ids, sampler, keep_logits):
            row = position - (self.length - len(token_ids) + 1)
            if 0 <= row < len(logits):
                logits = logits.copy()
                logits[row, 7] = np.nan
            return super().choose(logits, token_ids, sampler, keep_logits)

    return Spoiling


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("given", [{}, {"temperature": 0.8, "seed": 3}, {"forced_token_ids": {5: 3}}], ids=str)
@pytest.mark.parametrize("kind", ["mtp", "ngram"])
def test_the_tokens_before_the_first_bad_row_are_kept(kit, kind, given, after):
    given = {"max_new_tokens": 16, "ignore_eos": True, **given}
    sound = kit.shared(kind).generate(PROMPT, speculate="off", **given)
    session = kit.session(kind, sequence_class=spoiling(kit, len(PROMPT) + after))
    for speculate in ("off", "auto"):
        stream = session.stream(PROMPT, speculate=speculate, **given)
        with pytest.raises(
            NonFiniteLogitsError, match=rf"target's logits for position {len(PROMPT) + after} "
        ) as caught:
            list(stream)
        assert stream.result.token_ids == sound.token_ids[:after]
        assert caught.value.partial_text == stream.result.text
        assert session.running.dtype in caught.value.message


def test_a_bad_row_that_plain_decoding_never_reaches_is_no_error(kit):
    """Rows of rejected drafts, and of those after the end of the output."""
    from polydraft_reference.sequence import ReferenceSequence

    class BadAfterRejected(ReferenceSequence):
        def choose(self, logits, token_ids, sampler, keep_logits):
            chosen = [int(row.argmax()) for row in logits]
            right = 0
            while right < len(token_ids) - 1 and token_ids[right + 1] == chosen[right]:
                right += 1
            logits = logits.copy()
            logits[right + 1 :] = np.nan
            return super().choose(logits, token_ids, sampler, keep_logits)

    given = {"max_new_tokens": 40, "ignore_eos": True}
    plain = kit.shared("mtp", agreement=0.6).generate(PROMPT, speculate="off", **given)
    found = kit.session("mtp", agreement=0.6, sequence_class=BadAfterRejected).generate(PROMPT, **given)
    assert found.token_ids == plain.token_ids
    assert 0 < found.stats.num_accepted_tokens < found.stats.num_draft_tokens


@pytest.mark.parametrize("given", [{}, {"temperature": 1.0}, {"temperature": 1.0, "acceptance": "rejection"}], ids=str)
def test_a_broken_drafter_is_named(kit, given):
    from polydraft.sampling.numpy_ops import NumpyLogits

    class BrokenDrafter(kit.sequence_class):
        def propose(self, newest, k, sampler, *, keep_logits=False):
            from polydraft.contract import Proposal

            bad = np.full((1, self.model.config.vocab_size), np.nan, np.float32)
            drafts = [int(sampler.choose_draft(bad, self.length + 1 + index, [newest])[0]) for index in range(k)]
            return Proposal(drafts, NumpyLogits(bad) if keep_logits else None)

    session = kit.session("mtp", sequence_class=BrokenDrafter)
    with pytest.raises(NonFiniteLogitsError, match="drafter's logits"):
        session.generate(PROMPT, max_new_tokens=16, seed=1, ignore_eos=True, **given)
    # The target is not broken.
    assert session.generate(PROMPT, max_new_tokens=16, seed=1, speculate="off", **given).token_ids


def test_whole_engines_that_report_nan_are_refused(kit):
    """A whole engine shows logits only by the log-probabilities that it reports."""
    from polydraft._session.session import Session
    from polydraft.contract import TokenLogprobs, WholeEngine

    stepping = kit.shared("mtp")

    class Whole(WholeEngine):
        tokenizer, running = stepping.tokenizer, stepping.running

        def rounds(self, generation):
            entries = [TokenLogprobs(token_id=9, logprob=value) for value in (-0.5, float("nan"))]
            yield generation.emit([9, 9], num_draft_tokens=0, num_accepted_tokens=0, logprobs=entries)

        def close(self):
            pass

    session = Session(Whole(), stepping.running, kit.backend.capabilities())
    stream = session.stream(PROMPT, logprobs=0)
    with pytest.raises(NonFiniteLogitsError, match=f"position {len(PROMPT) + 1} "):
        list(stream)
    assert stream.result.token_ids == (9,)


def test_a_check_at_load_raises_the_same_error(kit, monkeypatch):
    from polydraft._load import open_session
    from polydraft_reference import backend

    request = kit.request("mtp", exactness="bitwise")
    loaded = kit.backend.load_engine(request)
    loaded.sequence_class = spoiling(kit, 14)
    monkeypatch.setattr(backend.ReferenceBackend, "load_engine", lambda self, request: loaded)
    with pytest.raises(NonFiniteLogitsError, match="position 14 "):
        open_session(kit.backend, request)
    assert issubclass(NonFiniteLogitsError, PolydraftError)
