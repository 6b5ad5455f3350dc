"""Generate once, and see what speculation did: ``python examples/generate.py [TARGET]``."""

import sys

import polydraft

PROMPT = '''class Stack:
    """A stack of items."""

    def __init__(self):
        self.items = []

    def push(self, item):
'''

target = sys.argv[1] if len(sys.argv) > 1 else "builtin:tiny-e2b"

# In 16 bits, rounding can decide between two nearly tied tokens; in float32 it very rarely does. Where a model is too
# large for float32, exactness="bitwise" makes plain and speculative decoding round alike, or refuses to load.
with polydraft.load(target, dtype="float32") as session:
    running = session.running
    print(f"{running.engine} {running.engine_version}, drafter {running.drafter}, k={running.num_speculative_tokens}")

    # Sampled, since greedy decoding of so small a model as the built-in ones soon repeats itself.
    result = session.generate(PROMPT, max_new_tokens=80, temperature=0.7, seed=4)
    print(result.text)
    print(f"finished by {result.finish_reason}, {result.stats.num_tokens} tokens in {result.stats.num_drafts} rounds")
    if result.stats.acceptance_rate is not None and result.stats.mean_acceptance_length is not None:
        rate, length = result.stats.acceptance_rate, result.stats.mean_acceptance_length
        print(f"acceptance rate {rate:.0%}, mean acceptance length {length:.2f}")

    # The seed gives the same tokens without speculation: that is the promise.
    plain = session.generate(PROMPT, max_new_tokens=80, temperature=0.7, seed=4, speculate="off")
    print("identical:", plain.token_ids == result.token_ids)
    if plain.token_ids != result.token_ids:
        print("Two tokens may have been nearly tied: `polydraft generate --compare` gives the verdict.")
