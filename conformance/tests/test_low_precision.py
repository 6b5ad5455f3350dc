"""GPU kernels as the suite sees them: rounding passes as near ties, and defects below it are still caught."""

import zlib
from contextlib import nullcontext

import numpy as np
import pytest
from polydraft_conformance.defects import honest
from polydraft_conformance.defects.making import defective
from polydraft_conformance.defects.stepping import StaleRow
from polydraft_conformance.defects.stepping_kept import NotRolledBack, RolledOver, SharedBuffers
from polydraft_conformance.defects.whole_settings import ScoredByDrafter
from polydraft_conformance.rendering.markdown import to_markdown
from polydraft_reference.sequence import ReferenceSequence

COARSE = {"dtype": "bfloat16", "exactness": frozenset({"standard"})}


class Rounded(ReferenceSequence):
    """Logits are rounded, and off by up to one of the grid's steps, by how the tokens before them were run.

    Prefills and steps differ, and so do prefills that begin elsewhere: the KV keeps it.
    """

    grid = 0.125

    def __init__(self, engine, model=None):
        super().__init__(engine, model)
        self.ways = []

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.ways += [self.length] * len(token_ids)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    def verify(self, token_ids, sampler, *, keep_logits=False):
        self.ways += [-1] * len(token_ids)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)

    def rollback(self, length):
        super().rollback(length)
        del self.ways[length:]

    def choose(self, logits, token_ids, sampler, keep_logits):
        first = self.length - len(logits)
        rows = np.stack([self.off(np.round(line / self.grid), first + row) for row, line in enumerate(logits)])
        return super().choose((rows * self.grid).astype(np.float32), token_ids, sampler, keep_logits)

    def off(self, line, position):
        if set(self.ways[: position + 1]) <= {0, -1}:  # a fresh prefill, and steps
            return line
        key = zlib.crc32(f"{self.ways[: position + 1]}".encode())
        return line + np.random.default_rng(key).integers(-1, 2, size=len(line))


TURNS = (
    "test_next_turn_after_every_end",
    "test_prompts_that_resemble_the_last",
    "test_turns_reuse_what_is_there",
)


def run_checks(conformance, backend, *checks, seed="5"):
    options = ("--polydraft-kinds", "mtp", "--polydraft-seed", seed, "-k", " or ".join(checks))
    return conformance(*options, backend=backend)


def failed(run):
    return {row.check: row.reason for row in run.report.rows if row.status == "fail"}


def test_rounding_of_reused_tokens_is_a_near_tie(conformance):
    near_ties = 0
    for seed in ("1", "2"):
        run = run_checks(conformance, defective(Rounded, **COARSE), *TURNS, seed=seed)
        assert failed(run) == {}
        near_ties += run.report.verdicts()["NEAR_TIE"]
    assert near_ties


@pytest.mark.parametrize("defect", [NotRolledBack, RolledOver, SharedBuffers])
def test_ghosts_are_caught_where_rounding_passes(conformance, defect):
    backend = defective(type("Ghosts", (defect, Rounded), {}), **COARSE)
    run = run_checks(conformance, backend, "test_prompts_that_resemble_the_last", seed="2")
    assert "an earlier prompt's cache was used" in failed(run)["test_prompts_that_resemble_the_last"]


class LaterRows(ReferenceSequence):
    """Past a few dozen tokens, where kernels change, rows of larger steps are off by a step of the grid."""

    grid, after = 0.125, 40

    def choose(self, logits, token_ids, sampler, keep_logits):
        rows = np.round(logits / self.grid)
        first = self.length - len(logits)
        for row in range(len(rows) if len(token_ids) > 1 else 0):
            if first + row > self.after:
                key = zlib.crc32(f"{first + row}".encode())
                rows[row] += np.random.default_rng(key).integers(-1, 2, size=rows.shape[1])
        return super().choose((rows * self.grid).astype(np.float32), token_ids, sampler, keep_logits)


class WrongAtTimes(ReferenceSequence):
    """A draft model that is wrong, by much, after each twentieth token."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        return super().choose(np.roll(logits, self.length % 20 == 0, axis=1), token_ids, sampler, keep_logits)


ITSELF = ("test_target_drafts_for_itself",)


def test_rejected_near_ties_of_the_target_itself_are_accounted_for(conformance):
    run = run_checks(conformance, defective(LaterRows, **COARSE), *ITSELF, seed="1")
    assert failed(run) == {}
    (row,) = (row for row in run.report.rows if row.check == ITSELF[0])
    assert 0.85 <= row.numbers["acceptance"]["acceptance_rate"] < 1.0
    assert row.numbers["rejected_near_ties"] > 0


def test_rejected_drafts_that_are_no_near_ties_are_not_excused(conformance, monkeypatch):
    monkeypatch.setattr("polydraft_reference.engine.ReferenceSequence", WrongAtTimes)
    run = run_checks(conformance, defective(LaterRows, **COARSE), *ITSELF, seed="1")
    assert "is not always right" in failed(run)[ITSELF[0]]


def test_in_float32_the_target_itself_is_always_right(conformance):
    run = run_checks(conformance, defective(LaterRows), *ITSELF, seed="1")
    assert "is not always right" in failed(run)[ITSELF[0]]


class Tf32(ReferenceSequence):
    """Rows of larger steps are off by a few parts in ten thousand, as in TF32."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        if len(token_ids) > 1:
            first = self.length - len(logits)
            logits = logits.copy()
            for row in range(len(logits)):
                random = np.random.default_rng(zlib.crc32(f"{first + row} {len(token_ids)}".encode()))
                logits[row] += 5e-4 * np.abs(logits[row]).max() * random.uniform(-1, 1, size=logits.shape[1])
        return super().choose(logits, token_ids, sampler, keep_logits)


class StaleTf32(StaleRow, Tf32):
    """The same with a defect."""


PRIMITIVES = ("test_rows_equal_single_steps", "test_steps_equal_prefill", "test_rollback_is_exact")
STANDARD = {"exactness": frozenset({"standard"})}


def test_tolerances_follow_the_declared_precision_of_products(conformance, capsys):
    run = run_checks(conformance, defective(Tf32, **STANDARD), *PRIMITIVES)
    assert "more than rounding in float32 explains" in failed(run)["test_rows_equal_single_steps"]
    run = run_checks(conformance, defective(Tf32, matmul_precision="tf32", **STANDARD), *PRIMITIVES)
    assert failed(run) == {}
    rows = [row for row in run.report.rows if row.check in PRIMITIVES]
    assert {row.numbers["matmul_precision"] for row in rows} == {"tf32"}
    assert "The engine declares matrix products in tf32" in to_markdown(run.report.as_dict())
    assert "The engine declares matrix products in tf32" in capsys.readouterr().out
    run = run_checks(conformance, defective(StaleTf32, matmul_precision="tf32", **STANDARD), *PRIMITIVES)
    assert "rows are left that were rolled back" in failed(run)["test_rollback_is_exact"]


class NoisyScores(honest.Whole):
    """Log-probabilities of decoding are some hundredths off those of a prefill, as in bfloat16."""

    def rounds(self, generation):
        self.generation = generation
        yield from super().rounds(generation)

    def scored(self, request, rows, tokens):
        if place := len(self.generation.token_ids):
            rows = rows + np.random.default_rng(place).uniform(-0.04, 0.04, size=rows.shape)
        return super().scored(request, rows, tokens)


class NoisyScoresOfTheDrafter(NoisyScores, ScoredByDrafter):
    """The same with a defect."""


@pytest.mark.parametrize(
    ("whole", "claims", "reason"),
    [
        (NoisyScores, {"dtype": "bfloat16"}, None),
        (NoisyScores, {}, "more than 0.05"),
        (NoisyScoresOfTheDrafter, {"dtype": "bfloat16"}, "the drafter's, or another row's"),
    ],
)
def test_log_probabilities_may_be_off_by_what_plain_decoding_is(conformance, monkeypatch, whole, claims, reason):
    monkeypatch.setattr("polydraft_conformance.checks.test_settings.other_engine", lambda _: nullcontext())
    backend = defective(whole=whole, **honest.CLAIMS, **claims)
    found = failed(run_checks(conformance, backend, "test_logprobs_are_the_targets"))
    assert reason in found["test_logprobs_are_the_targets"] if reason else found == {}
