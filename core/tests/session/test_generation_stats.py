"""Statistics of several generations."""

from polydraft import GenerationStats

FIRST = GenerationStats(
    num_tokens=5,
    num_target_steps=3,
    num_drafts=2,
    num_draft_tokens=4,
    num_accepted_tokens=2,
    accepted_per_position=(2,),
    prefill_seconds=1.0,
    decode_seconds=2.0,
)
SECOND = FIRST.model_copy(update={"num_tokens": 7, "accepted_per_position": (1, 1, 0)})


def test_totals():
    total = GenerationStats.total([FIRST, SECOND])
    assert (total.num_tokens, total.num_target_steps, total.num_drafts) == (12, 6, 4)
    assert total.accepted_per_position == (3, 1, 0)
    assert total.acceptance_rate == 0.5
    assert total.mean_acceptance_length == 2.0
    # Generations may overlap: their times do not add up.
    assert total.prefill_seconds is total.decode_seconds is total.tokens_per_second is None


def test_what_one_does_not_report_is_not_in_the_total():
    total = GenerationStats.total(iter([FIRST, GenerationStats(num_tokens=1, num_drafts=0)]))
    assert (total.num_tokens, total.num_drafts) == (6, 2)
    assert total.num_draft_tokens is total.num_accepted_tokens is total.accepted_per_position is None


def test_the_total_of_nothing():
    assert GenerationStats.total([]) == GenerationStats(
        num_tokens=0,
        num_prompt_tokens=0,
        num_reused_tokens=0,
        num_target_steps=0,
        num_drafts=0,
        num_draft_tokens=0,
        num_accepted_tokens=0,
        accepted_per_position=(),
        drafted_per_position=(),
    )
