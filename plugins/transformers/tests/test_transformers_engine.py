"""The engine on the built-in pairs, against Transformers' own forwards and generate()."""

import subprocess
import sys

import polydraft
import pytest
from polydraft._registry import versions
from polydraft.errors import BackendUnavailableError, ContextLengthError, DeviceError, InvalidRequestError
from polydraft_conformance.testing import GreedySampler

torch = pytest.importorskip("torch", reason="torch is not installed")
pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

PROMPT = [2, *range(300, 340)]
LONG = [2, *(300 + (7 * i) % 600 for i in range(200))]  # past the window of 64


@pytest.fixture(scope="module", params=["tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama"])
def session(request):
    with polydraft.load(f"builtin:{request.param}", backend="transformers", dtype="float32", device="cpu") as loaded:
        yield loaded


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["short", "long"])
def test_greedy_equals_generate(session, prompt):
    model = session.engine.target.model
    with torch.inference_mode():
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, use_cache=True
        )
    result = session.generate(prompt, max_new_tokens=24, ignore_eos=True)
    assert list(result.token_ids) == wanted[0, len(prompt) :].tolist()
    assert result.stats.num_draft_tokens > 0


@pytest.mark.parametrize("length", [60, 63, 64, 65, 66, 70, 130, 330])
def test_after_a_rollback_the_logits_are_those_of_a_fresh_prefill(session, length):
    tokens = (LONG + LONG)[: length + 1]
    used, fresh = session.engine.open_sequence(), session.engine.open_sequence()
    greedy = GreedySampler(session.engine)
    used.prefill(tokens[:length], greedy)
    used.verify([5, 6, 7, 8, 9], greedy)
    used.rollback(length)
    got = used.verify(tokens[length:], greedy, keep_logits=True).logits.numpy()
    want = fresh.prefill(tokens, greedy, keep_logits=True).logits.numpy()
    assert abs(got - want).max() < 1e-3


def test_drafter_logits_are_upstreams():
    with polydraft.load("builtin:tiny-e2b", backend="transformers", dtype="float32", device="cpu") as loaded:
        sequence = loaded.engine.open_sequence()
        greedy = GreedySampler(loaded.engine)
        newest = sequence.prefill(PROMPT, greedy).token_ids[0]
        ours = sequence.propose(newest, 1, greedy, keep_logits=True).logits.numpy()
        model, assistant = loaded.engine.target.model, loaded.engine.drafter_model
        with torch.inference_mode():
            out = model(torch.tensor([PROMPT]), output_hidden_states=True, return_shared_kv_states=True)
            embedded = model.get_input_embeddings()(torch.tensor([[newest]]))
            upstream = (
                assistant(
                    inputs_embeds=torch.cat([embedded, out.hidden_states[-1][:, -1:]], dim=-1),
                    position_ids=torch.tensor([[len(PROMPT)]]),
                    shared_kv_states=dict(out.shared_kv_states),
                    use_cache=False,
                )
                .logits[0]
                .numpy()
            )
        assert abs(ours - upstream).max() < 1e-3


class Replayed:
    """What a CUDA graph does, on a CPU: it reads and writes the same tensors each time."""

    def __init__(self, function, inputs, neighbour=None):
        self.function, self.inputs, self.outputs = function, [given.clone() for given in inputs], None

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        made = self.function(*self.inputs)
        self.outputs = self.outputs or [part.clone() for part in made]
        for own, part in zip(self.outputs, made, strict=True):
            own.copy_(part)
        return tuple(self.outputs)


@pytest.mark.parametrize("pair", ["tiny-e2b", "tiny-31b"])
@pytest.mark.parametrize("exactness", ["standard", "bitwise"])
def test_captured_steps_give_the_same(pair, exactness, monkeypatch):
    """Across position 256, where the captured span doubles and the buffers move."""
    given = {"backend": "transformers", "dtype": "float32", "device": "cpu", "exactness": exactness}
    with polydraft.load(f"builtin:{pair}", **given) as loaded:
        wanted = loaded.generate(LONG, max_new_tokens=70, ignore_eos=True)
        target = loaded.engine.target
        monkeypatch.setattr("polydraft_transformers.kv_cache.Captured", Replayed)
        monkeypatch.setattr(target, "captures", True)
        target._free.clear()
        found = loaded.generate(LONG, max_new_tokens=70, ignore_eos=True)
        assert {key[0] for key in target._free[-1]._captured} == {"step", "draft"}
        assert found.token_ids == wanted.token_ids
        assert found.stats.num_accepted_tokens == wanted.stats.num_accepted_tokens > 0


def test_cuda_where_there_is_none():
    if torch.cuda.is_available():
        with polydraft.load("builtin:tiny-e2b", backend="transformers", device="cuda") as loaded:
            assert loaded.running.device.startswith("cuda")
        return
    with pytest.raises(DeviceError, match="cuda"):
        polydraft.load("builtin:tiny-e2b", backend="transformers", device="cuda")


def test_an_unknown_dtype_is_told_before_transformers_is_imported():
    code = (
        "import sys, polydraft\n"
        "try: polydraft.load('builtin:tiny-e2b', backend='transformers', dtype='float99')\n"
        "except polydraft.errors.InvalidRequestError: print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("dtype", "float99", InvalidRequestError),
        ("device", "no-such", DeviceError),
        ("context_length", 10**9, ContextLengthError),
        ("engine_options", {"num_thread": 1}, InvalidRequestError),
    ],
)
def test_bad_arguments(argument, value, error):
    with pytest.raises(error):
        polydraft.load("builtin:tiny-e2b", backend="transformers", **{argument: value})


@pytest.fixture
def installed(monkeypatch):
    """Makes another version of transformers the installed one, as far as polydraft can see."""
    real = versions._version

    def fake(version):
        monkeypatch.setattr(versions, "_version", lambda name: version if name == "transformers" else real(name))

    return fake


def test_5_23_0_runs_everything_but_assistants(installed):
    installed("5.23.0")
    given = {"backend": "transformers", "device": "cpu", "dtype": "float32"}
    with polydraft.load("builtin:tiny-e2b", **given) as session:
        assert session.running.method == "ngram"
        assert any("5.23.0" in note and "!=5.23.0" in note for note in session.running.notes)
        assert session.generate(PROMPT, max_new_tokens=4).token_ids
    with pytest.raises(BackendUnavailableError, match=r"5\.23\.0 has a known fault") as error:
        polydraft.load("builtin:tiny-e2b", drafter="builtin:tiny-e2b-assistant", **given)
    assert "!=5.23.0" in error.value.hint
    with polydraft.load("builtin:tiny-llama", **given) as session:
        assert session.running.method == "draft-model"


def test_a_version_without_gemma_4_assistants_is_too_old(installed):
    installed("5.16.2")
    with pytest.raises(BackendUnavailableError, match=r"transformers >=5\.17"):
        polydraft.load("builtin:tiny-e2b", backend="transformers", drafter=None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_with_one_kv_head_attends_exactly(device):
    """Its head is repeated as a view, of which torch's memory-efficient attention reads wrong keys: see ``decoder``."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from polydraft_transformers.decoder import Decoder
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    token_ids = [(7 * index) % 300 for index in range(129)]
    with torch.inference_mode():
        wanted = model(torch.tensor([token_ids])).logits[0]
        decoder = Decoder(model.to(device), 5)
        cache = decoder.open_cache()
        cache.begin_prompt(len(token_ids), decoder.device, kept=len(token_ids))
        found = decoder.logits(decoder.network.run(torch.tensor(token_ids, device=device), cache)).cpu()
    assert (found - wanted).abs().max() < 1e-4
