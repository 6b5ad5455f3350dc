"""Arguments in sentences become flags, and nothing else does."""

import pytest
from polydraft._flags import in_flags


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("Use `drafter=None`.", "Use `--drafter none`."),
        ("Raise `max_new_tokens`, or see `polydraft doctor`.", "Raise `--max-new-tokens`, or see `polydraft doctor`."),
        ("Give `stop=('a b', 'c')`.", "Give `--stop 'a b' --stop c`."),
        ("Set `trust_remote_code=True`.", "Set `--trust-remote-code`."),
        ("Set `trust_remote_code=False`.", "Set `trust_remote_code=False`."),
        # What a user gave may hold anything.
        ("No device 'x`stop=1' here.", "No device 'x`stop=1' here."),
        ("No drafter 'x`y' `dtype='auto'`.", "No drafter 'x`y' `--dtype auto`."),
        ("Not `logit_bias={[1]: 2}`.", "Not `--logit-bias {[1]: 2}`."),
        ("Not `engine_options={'a': {1, 2}}`.", "Not `--engine-option {'a': {1, 2}}`."),
        ("Cut: `dtype='flo...`", "Cut: `--dtype 'flo...`"),
        ("Give `engine_options={'url': ...}`.", "Give `--engine-option url=...`."),
    ],
)
def test_arguments_between_backticks_become_flags(sentence, shown):
    assert in_flags(sentence) == shown
