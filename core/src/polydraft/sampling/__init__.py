"""How a token is chosen from logits: one rule, written once, for every array library.

The choice at a position is a function of (logits there, settings, seed, stream, absolute position) and of nothing else.
Plain and speculative decoding both use it; a draft is accepted while it equals the choice. So a seeded sample is the
same token sequence with and without speculation.

``noise`` and ``rule`` are the definition, ``numpy_ops`` its array operations on numpy; ``_host`` finds the same choices
faster in host memory. ``_sampler`` applies one generation's settings (``_adjustments``, ``_processors``) and then the
rule; ``_rejection`` is the sampler of ``acceptance="rejection"``.

Penalties and processors depend on the tokens before a row, and no call reports which drafts were accepted. ``_history``
derives it from the position at which the next step starts::

    step n    verify([t, d1, d2, d3]), t at position 10     chooses for 11 12 13 14;  pending: t d1 d2 d3
              accepted: d1; the bonus token u replaces d2
    step n+1  verify([u, ...]), u at position 12            starts at 12: t and d1 (10, 11) are committed, d2 and d3
                                                            leave no trace
"""
