"""Choosing in a recorded step against the core's rule: noise, kernels, and a head with centroids."""

from types import SimpleNamespace

import pytest
from polydraft.contract import GenerationSettings
from polydraft.sampling.noise import key_base, row_keys
from polydraft.sampling.on_device import DeviceChoice
from polydraft.sampling.rule import choose_tokens, numbers_of

torch = pytest.importorskip("torch", reason="torch is not installed")
step_choice = pytest.importorskip("polydraft_transformers.step_choice")

from polydraft_transformers.array_ops import TorchOps  # noqa: E402

SEED, STREAM, POSITION = 2**62 + 7, 3, 77


@pytest.fixture(params=["definition", "kernels"])
def either(request):
    """The device of a way to choose."""
    return "cpu" if request.param == "definition" else request.getfixturevalue("device")


def prepared(device, position=POSITION, **settings):
    """The state and the kind of a choice, and the settings."""
    given = GenerationSettings(**settings)
    choice = DeviceChoice(key_base(SEED, STREAM), numbers_of(given) if given.temperature else None, None)
    state = torch.tensor([step_choice.state_of(choice, 5, position)], device=device)
    return state, step_choice.kind_of(choice), given


def test_keys_of_the_noise(either):
    state, _, _ = prepared(either)
    keys = step_choice.noise_keys(state, POSITION + torch.arange(9, device=either))
    assert keys.T.tolist() == list(row_keys(SEED, STREAM, range(POSITION + 1, POSITION + 10)))


def drawn_settings(lots):
    temperature = lots.choice([0.0, 0.3, 1.0, 1.7])
    if not temperature:
        return {"temperature": 0.0}
    return {
        "temperature": temperature,
        "top_k": lots.choice([0, lots.between(1, 50, 300)]),
        "top_p": lots.choice([1.0, 1.0, 0.7, 0.99]),
        "min_p": lots.choice([0.0, 0.0, 0.05, 1.0]),
    }


@pytest.mark.parametrize("lots", range(24), indirect=True)
def test_the_choice_is_the_rules(either, lots):
    device = either
    rows = lots.between(1, 2, 5, 9)
    vocab = lots.between(3, 2048, 5001) if device == "cpu" else lots.between(3, 2048, 5001, 262_144)
    state, kind, settings = prepared(device, **drawn_settings(lots))
    logits = torch.randn(rows, 2 * vocab, device=device)[:, :vocab] * lots.choice([0.0, 0.1, 4.0])
    logits = logits.to(lots.choice([torch.float32, torch.bfloat16]))
    if lots.random() < 0.5:
        logits[:, lots.randrange(vocab) :] = -torch.inf
        logits[:, 0] = -1.0
    keys = step_choice.noise_keys(state, POSITION + torch.arange(rows, device=device))
    tokens, largest = step_choice.choose(logits, keys, state, kind)
    wanted = choose_tokens(TorchOps(), logits, settings, SEED, STREAM, POSITION + 1)
    assert tokens.tolist() == wanted.tolist()
    assert largest.tolist() == logits.float().amax(-1).tolist()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.05}])
def test_each_sequence_has_a_state_of_its_own(either, settings):
    device = either
    torch.manual_seed(0)
    numbers = range(1, 4)
    states = []
    for number in numbers:
        own = settings or {"temperature": 0.5 * number}
        state, kind, _ = prepared(device, POSITION * number, **{"temperature": 0.5 * number, **own})
        state[0, 2] += number  # another seed
        states.append(state)
    every = torch.cat(states)
    positions = (every[:, 1:2] + torch.arange(2, device=device)).flatten()
    logits = torch.randn(6, 5000, device=device)
    keys = step_choice.noise_keys(every, positions)
    found = step_choice.choose(logits, keys, every, kind)
    alone = [
        step_choice.choose(rows, step_choice.noise_keys(state, at), state, kind)
        for rows, at, state in zip(logits.split(2), positions.split(2), states, strict=True)
    ]
    assert all(torch.equal(one, torch.cat(parts)) for one, parts in zip(found, zip(*alone, strict=True), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_sound_spoils_no_other(device, value):
    state, kind, _ = prepared(device, temperature=1.0)
    logits = torch.randn(3, 5000, device=device)
    keys = step_choice.noise_keys(state, POSITION + torch.arange(3, device=device))
    before, _ = step_choice.choose(logits, keys, state, kind)
    logits[1, slice(None) if value < 0 else 4321] = value
    after, largest = step_choice.choose(logits, keys, state, kind)
    assert after[[0, 2]].tolist() == before[[0, 2]].tolist()
    assert 0 <= int(after[1]) < 5000
    assert torch.equal(largest.isfinite().cpu(), torch.tensor([True, False, True]))


def head_of(device, dtype, clusters, size, top, width):
    embedder = SimpleNamespace(
        centroids=SimpleNamespace(weight=torch.randn(clusters, width, device=device).to(dtype)),
        num_centroids=clusters,
        centroid_intermediate_top_k=top,
        token_ordering=torch.randperm(clusters * size, device=device),
    )
    weight = (torch.randn(clusters * size, width, device=device) * 0.2).to(dtype)
    return step_choice.ClusteredHead(embedder, weight)


@pytest.mark.parametrize("lots", range(12), indirect=True)
def test_a_head_with_centroids(device, small, lots):
    """Where rounding decides, both ways may choose another token: its logit is then as large as the best one's."""
    dtype = lots.choice([torch.float32, torch.bfloat16])
    large = (70, 33, 5, 40) if small else (2048, 128, 32, 256)
    clusters, size, top, width = lots.choice([(16, 16, 4, 32), (24, 40, 8, 48), large])
    head = head_of(device, dtype, clusters, size, top, width)
    equal = 0
    for step in range(6):
        state, kind, _ = prepared(device, POSITION + step, **{**drawn_settings(lots), "top_k": 0, "top_p": 1.0})
        keys = step_choice.noise_keys(state, state[:, 1].contiguous())
        row = torch.randn(1, width, device=device).to(dtype)
        for vocab in (clusters * size, clusters * size - 7):
            token, largest = head.choose(row, keys, state, kind, vocab)
            logits = head.logits(row)[:, :vocab]
            wanted, most = step_choice.choose(logits, keys, state, kind)
            assert 0 <= int(token) < vocab
            equal += int(token) == int(wanted)
            assert torch.allclose(largest, most, rtol=1e-5 if dtype == torch.float32 else 2e-2)
    assert equal >= (12 if dtype == torch.float32 else 9)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 40}])
def test_rows_of_several_sequences_with_centroids(device, small, settings):
    torch.manual_seed(0)
    clusters, size, top, width = (70, 33, 5, 40) if small else (2048, 128, 32, 256)
    head = head_of(device, torch.bfloat16, clusters, size, top, width)
    states, kind = [], None
    for number in range(3):
        state, kind, _ = prepared(device, POSITION + number, **settings)
        states.append(state)
    rows = torch.randn(3, width, device=device).bfloat16()
    every = torch.cat(states)
    keys = step_choice.noise_keys(every, every[:, 1].contiguous())
    found = head.choose(rows, keys, every, kind, clusters * size)
    for index, state in enumerate(states):
        alone = head.choose(rows[index : index + 1], keys[index : index + 1], state, kind, clusters * size)
        # The product with the centroids may round otherwise for one row.
        assert torch.allclose(found[1][index], alone[1][0], rtol=2e-2)


def test_an_ordering_that_leaves_tokens_out_has_no_kernel(device):
    weight = torch.randn(256, 32, device=device)
    centroids = SimpleNamespace(weight=torch.randn(16, 32, device=device))
    embedder = SimpleNamespace(
        centroids=centroids,
        num_centroids=16,
        centroid_intermediate_top_k=4,
        token_ordering=torch.zeros(256, device=device),
    )
    head = step_choice.ClusteredHead(embedder, weight)
    assert not head._is_fused


def test_centroids_that_are_not_finite_show(device):
    head = head_of(device, torch.float32, 16, 16, 4, 32)
    state, kind, _ = prepared(device, temperature=0.0)
    row = torch.full((1, 32), torch.nan, device=device)
    token, largest = head.choose(row, step_choice.noise_keys(state, state[:, 1].contiguous()), state, kind, 256)
    assert 0 <= int(token) < 256
    assert largest.isnan().all()
