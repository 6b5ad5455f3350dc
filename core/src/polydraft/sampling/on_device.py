"""Choosing tokens in a step that an engine has recorded, such as a CUDA graph, without asking the host.

The engine asks ``device_choice`` what the choice depends on, computes it by ``rule.choose_by_numbers`` with the keys of
``noise.keys_at``, or by a kernel of its own that chooses the same tokens, and says afterwards what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.noise import key_base
from polydraft.sampling.rule import RuleNumbers, numbers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract.stepping import Sampler

__all__ = ["DeviceChoice", "device_choice"]


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """What the choices of one generation depend on, besides logits and positions: from some position on, to its end."""

    key_base: int
    """Of the noise: ``noise.key_base``, 64 bits, unsigned."""
    numbers: RuleNumbers | None
    """None at temperature 0: the largest logit, of equal ones the lowest id."""
    sampler: RuleSampler

    def drafted(self, first_position: int, largest: Sequence[float]) -> None:
        """Drafts were chosen for the positions from ``first_position`` on.

        Args:
            first_position: Of the first draft.
            largest: The largest number of each draft's logits, NaN if there is one: it tells whether they are sound.
        """
        self.sampler.count_drafts(first_position, largest)

    def chosen(self, token_ids: list[int], first_position: int, run_token_ids: Sequence[int]) -> list[int]:
        """The target's tokens were chosen; the arguments are those of ``Sampler.choose``.

        Args:
            token_ids: One per row; -1 where the row's largest number is not finite. A single row is not: the engine
                lets ``Sampler.choose`` refuse it.
            first_position: As there.
            run_token_ids: As there.

        Returns:
            ``token_ids``.

        Raises:
            NonFiniteLogitsError: The draft that is rejected was chosen from logits that are not finite.
        """
        self.sampler.count_choices(token_ids, first_position, run_token_ids)
        return token_ids


def device_choice(sampler: Sampler, first_position: int) -> DeviceChoice | None:
    """How a sampler chooses from a position on, if logits, positions and a few numbers are all that counts.

    Args:
        sampler: The one that the loop gave to the engine.
        first_position: Of the first token to be chosen.

    Returns:
        None where the host must take part: for processors, penalties, biases, bans and forced tokens that are still to
        come, log-probabilities, typical_p, and ``acceptance="rejection"``.
    """
    if not isinstance(sampler, RuleSampler) or not sampler.chooses_on_device(first_position):
        return None
    settings, seed, stream = sampler.settings_and_noise
    numbers = numbers_of(settings) if settings.temperature > 0.0 else None
    return DeviceChoice(key_base(seed, stream), numbers, sampler)
