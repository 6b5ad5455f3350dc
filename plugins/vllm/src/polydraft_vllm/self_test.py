"""A test whether the installed verifier samples correctly. It runs at load on CPU, on made-up logits without a model.

The verifier gets many requests with the same drafts, sampled and greedy ones in one batch. Sampled tokens must have the
target's distribution, and greedy ones the largest logit. vLLM's own CPU fallback of 0.32 fails this test.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ["sampling_fault", "sampling_fault_of_worker"]

_LOGITS = (1.0, 0.2, -0.5, 2.0, 0.0, -1.0)
_TEMPERATURE = 0.7
_REQUESTS = 6000
_TOLERANCE = 5.0
"""Standard deviations. One load in a million would fail by chance; the generator is seeded, so none does."""


def sampling_fault_of_worker(worker: Any) -> str | None:
    """``sampling_fault`` as vLLM's ``collective_rpc`` calls it, in the worker's process."""
    return sampling_fault()


def sampling_fault() -> str | None:
    """The fault of sampling under speculation; None if it is correct.

    Takes milliseconds. Run it in a process that has created a vLLM worker: kernels get their CPU versions then.
    """
    try:
        return _sampling_fault()
    except Exception as error:  # uninitialised settings can have any value, and cause any error
        return f"the verifier fails: {type(error).__name__}: {error}"


def _sampling_fault() -> str | None:
    import torch
    from vllm.v1.sample import rejection_sampler

    generator = torch.Generator().manual_seed(1)
    vocab = len(_LOGITS)
    # With one draft each, repeating a value per draft would be the identity.
    drafts_each = 2
    tokens = _REQUESTS * drafts_each
    temperature = torch.full((_REQUESTS,), _TEMPERATURE)
    temperature[::3] = 0.0  # every third request is greedy
    metadata = SimpleNamespace(
        all_greedy=False,
        all_random=False,
        temperature=temperature,
        top_k=torch.full((_REQUESTS,), vocab - 1, dtype=torch.int32),
        top_p=None,
        generators=dict.fromkeys(range(_REQUESTS), generator),
    )
    cumulative = torch.arange(1, _REQUESTS + 1, dtype=torch.int32) * drafts_each
    logits = torch.tensor(_LOGITS).repeat(tokens, 1)
    best = int(torch.tensor(_LOGITS).argmax())
    # A step without drafts, such as a prefill alone, gives the verifier no rows.
    rejection_sampler.apply_sampling_constraints(logits[:0], torch.zeros_like(cumulative), metadata)
    constrained = rejection_sampler.apply_sampling_constraints(logits, cumulative, metadata)
    emitted = rejection_sampler.rejection_sample(
        torch.full((tokens,), 1, dtype=torch.int32),  # a draft that is sometimes right
        [drafts_each] * _REQUESTS,
        drafts_each,
        cumulative,
        # Without draft probabilities: each draft counts as certain, as from a greedy drafter.
        None,
        constrained,
        torch.full((_REQUESTS, 1), best, dtype=torch.int32),
        metadata,
    )
    greedy = emitted[::3, 0]
    if bool((greedy != best).any()):
        return "greedy requests in a batch with sampled ones do not get the token of the largest logit"
    # top_k drops exactly the least probable token.
    kept = torch.tensor(_LOGITS).topk(vocab - 1)
    wanted = torch.zeros(vocab)
    wanted[kept.indices] = torch.softmax(kept.values / _TEMPERATURE, dim=0)
    # Only first tokens: later ones exist only where the first draft was accepted.
    first = emitted[torch.arange(_REQUESTS) % 3 != 0, 0].long()
    found = torch.bincount(first, minlength=vocab).float() / len(first)
    # Standard deviation of a binomial share; the addend keeps the bound of an impossible token above 0.
    spread = (wanted * (1 - wanted) / len(first)).sqrt() + 1e-9
    if bool(((found - wanted).abs() > _TOLERANCE * spread).any()):
        return f"sampled tokens have the distribution {found.tolist()}, not {wanted.tolist()}"
    return None
