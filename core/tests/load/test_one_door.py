"""A wrong argument is the same typed error through every door: ``load``, ``prepare`` and each command."""

import pytest
from polydraft import load
from polydraft._cli.app import run
from polydraft._cli.options import _GROUPS
from polydraft._flags import FLAGS, words
from polydraft._load import prepare
from polydraft._load_arguments import LoadArguments
from polydraft._session.arguments import CallArguments
from polydraft.errors import InvalidRequestError

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")

TARGET = "builtin:toy"
WRONG = [
    ("num_speculative_tokens", 0, "drafts nothing", "`-k 0` drafts nothing. Use `--drafter none` for plain decoding."),
    ("num_speculative_tokens", -3, "out of range", "`-k -3` is out of range."),
    ("num_speculative_tokens", 99, "too large", "`-k 99` is too large: reference drafts at most"),
    ("num_speculative_tokens", "most", "not understood", "`-k most` is not understood. Give a whole number from 1 to"),
    ("dtype", "", "not understood", "`--dtype ''` is not understood."),
    ("exactness", "perfect", "is unknown", "`--exactness perfect` is unknown. Give 'standard' or 'bitwise'."),
    ("context_length", 0, "not a positive number", "`--context-length 0` is not a positive number of tokens."),
    ("context_length", 10**6, "too long", "`--context-length 1000000` is too long"),
    ("drafter", " ", "name is empty", "--drafter: The drafter's name is empty. Give `--drafter none`"),
    ("engine_options", {"nonsense": 1}, "no option 'nonsense'", "--engine-option: The backend reference has no option"),
]


@pytest.mark.parametrize(("argument", "value", "said", "shown"), WRONG)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_same_error_through_every_door(argument, value, said, shown, backend, capfd):
    for door in (load, prepare):
        with pytest.raises(InvalidRequestError, match=said) as raised:
            door(TARGET, backend=backend, **{argument: value})
        assert raised.value.argument == argument
    given = ["--model", TARGET, "--backend", backend, *words(argument, value)]
    for command in (["generate", "-p", "x"], ["chat"], ["verify"], ["serve", "--own-server", "--print"]):
        assert run([*command, *given]) == 2
        error, hint = capfd.readouterr().err.splitlines()
        assert f"{error.removeprefix('Error: ')} {hint.removeprefix('Hint: ')}".startswith(shown)


def test_every_command_takes_every_argument_that_has_a_flag():
    loading, settings = ({option.name for option in _GROUPS[name]} for name in ("loading", "settings"))
    assert loading - {"target"} == set(LoadArguments.__annotations__) & set(FLAGS)
    # A command loads for one k: the flag of ``load`` is that of the call, too.
    assert settings == set(CallArguments.__annotations__) & set(FLAGS) - {"num_speculative_tokens"}
    measuring = {"time_limit", "seconds", "prompts", "load_limit", "save_to", "keep"}
    measuring |= {"sweep_k", "against", "synthetic_acceptance", "repeats"}
    assert set(FLAGS) == loading | settings | measuring
