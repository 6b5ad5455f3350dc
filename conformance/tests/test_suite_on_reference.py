"""The whole suite on the reference engine: unchanged it passes, and a defect fails the check that names it."""

from polydraft.contract import Proposal, Step


def test_reference_passes(conformance):
    run = conformance()
    assert run.exit_code == 0
    assert run.rows("fail") == run.rows("follows") == run.rows("excluded") == set()
    report = run.report.as_dict()
    assert report["status"] == "pass"
    assert {entry["kind"] for entry in report["acceptance"]} == {"mtp", "draft-model", "ngram"}
    assert all(
        entry["drafted"] > entry["accepted"] > 0 for entry in report["acceptance"] if entry["kind"] != "draft-model"
    )


def test_an_engine_without_verification(conformance, mutant):
    from polydraft_reference.engine import ReferenceSequence

    class Unverified(ReferenceSequence):
        def choose(self, logits, token_ids, chooser, keep_logits):
            step = super().choose(logits, token_ids, chooser, keep_logits)
            return Step([*token_ids[1:], step.token_ids[-1]], step.logits, step.logprobs)

    run = conformance(backend=mutant(Unverified))
    assert run.exit_code == 1
    assert run.rows("fail") == {"test_greedy_equals_plain"}
    reasons = [row.reason for row in run.report.rows if row.status == "fail"]
    assert all(reason.startswith("Speculation changed the greedy output") for reason in reasons)
    assert all("plain: token " in reason and "margin" in reason for reason in reasons)


def test_a_rollback_that_leaves_a_row(conformance, mutant):
    from polydraft_reference.engine import ReferenceSequence

    class Stale(ReferenceSequence):
        """Keys and values of the first rolled back row stay in place of the last kept one's."""

        def rollback(self, length):
            rolled_back = self.length > length
            kept = self.cache.copy() if rolled_back else None
            super().rollback(length)
            if kept is not None:
                kept.truncate(length + 1)
                for layer, other in zip(self.cache.layers, kept.layers, strict=True):
                    keys, values = other.visible()
                    mine, its = layer.visible()
                    mine[-1], its[-1] = keys[-1], values[-1]
                    self.put_back(layer, mine, its)

        @staticmethod
        def put_back(layer, keys, values):
            slot = (layer.length - 1) % len(layer.keys)
            layer.keys[slot], layer.values[slot] = keys[-1], values[-1]

    run = conformance(backend=mutant(Stale))
    assert run.rows("fail") == {"test_rollback_is_exact"}
    assert any("rolled back" in row.reason for row in run.report.rows if row.status == "fail")


def test_a_silent_drafter(conformance, mutant):
    from polydraft_reference.engine import ReferenceSequence

    class Silent(ReferenceSequence):
        def propose(self, newest, k, chooser, *, keep_logits=False):
            return Proposal([])

    run = conformance("--polydraft-kinds", "mtp", backend=mutant(Silent))
    assert run.rows("fail") == {"test_drafts_are_made"}


def test_an_engine_that_raises(conformance, mutant):
    from polydraft_reference.engine import ReferenceSequence

    class Raising(ReferenceSequence):
        def verify(self, token_ids, chooser, *, keep_logits=False):
            if self.length > 30:
                raise ValueError("no more")
            return super().verify(token_ids, chooser, keep_logits=keep_logits)

    run = conformance("--polydraft-kinds", "mtp", backend=mutant(Raising))
    assert "test_generates" in run.rows("fail")
    assert run.rows("fail") <= {"test_generates", "test_rows_equal_single_steps"}


def test_an_engine_that_hangs(conformance, mutant):
    import time

    from polydraft_reference.engine import ReferenceSequence

    class Hanging(ReferenceSequence):
        def verify(self, token_ids, chooser, *, keep_logits=False):
            if len(token_ids) == 2:
                time.sleep(1000)
            return super().verify(token_ids, chooser, keep_logits=keep_logits)

    arguments = (
        "--polydraft-kinds",
        "mtp",
        "--polydraft-time-limit",
        "2",
        "-k",
        "test_generates or test_drafts_are_made",
    )
    run = conformance(*arguments, backend=mutant(Hanging))
    failed = [row for row in run.report.rows if row.status == "fail"]
    assert {row.check for row in failed} == {"test_generates"}
    assert all("time limit of 2 s" in row.reason for row in failed), failed
    assert all(row.seconds < 10 for row in run.report.rows)
