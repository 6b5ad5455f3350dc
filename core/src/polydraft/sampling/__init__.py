"""How a token is chosen from logits: one rule, written once, for every array library.

The choice at a position is a function of (logits there, settings, seed, stream, absolute position) and of nothing else.
Plain and speculative decoding both use it; a draft is accepted while it equals the choice. So a seeded sample is the
same token sequence with and without speculation.
"""
