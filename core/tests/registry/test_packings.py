"""One name, every engine: which packing of a target each backend gets, at every size of memory, and what is refused."""

import sys
import types
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft._load import prepare
from polydraft._plugins import PluginHost
from polydraft._registry.offers import Offers
from polydraft._registry.packing_choice import Memory, PackingChoice, memory_of
from polydraft._registry.packings import PackingRegistry
from polydraft._registry.pairs import PairRegistry
from polydraft.checkpoints._quantization import bits
from polydraft.contract import (
    Backend,
    BackendRecord,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    HubOptions,
    LocalModelRecord,
    ModelSource,
    hookimpl,
)
from polydraft.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    PolydraftError,
    UnsupportedError,
)

pytestmark = pytest.mark.usefixtures("clean_environment")

TARGET = "google/gemma-4-E4B-it"
MLX = "mlx-community/gemma-4-e4b-it"
GGUF = "unsloth/gemma-4-E4B-it-GGUF"
QAT = "google/gemma-4-E4B-it-qat-q4_0-gguf"
SIZES = {"bf16": 160_000, "8bit": 86_000, "6bit": 66_000, "5bit": 56_000, "4bit": 46_000, "mxfp8": 84_000}
FILES = {"BF16": 160_000, "Q8_0": 85_000, "Q6_K": 66_000, "Q4_K_M": 49_000, "UD-Q4_K_XL": 51_000, "Q2_K": 30_000}


class Any(Backend):
    rank = 50
    devices = ()

    def capabilities(self):
        return Capabilities(drafter_kinds={"mtp", "draft-model", "ngram"})

    def diagnose(self):
        return Diagnosis(usable=True, rank=self.rank, devices=self.devices)

    def load_engine(self, request):
        raise AssertionError("nothing may be loaded")


class Torch(Any):
    rank = 60


class Llama(Any):
    rank = 70

    def refuse(self, target, plan):
        for source in filter(None, (target, plan.drafter)):
            if source.format != "gguf" and source.path is None:
                return f"{source.id} has safetensors weights."
        return None


class Mlx(Any):
    pass


FORMATS = {"torch": {"safetensors"}, "llama": {"gguf", "safetensors"}, "mlx": {"mlx", "safetensors"}}


def backend_record(name):
    return BackendRecord(
        name=name,
        factory=f"packing_test_backends:{name.title()}",
        summary="",
        formats=FORMATS[name],
        converts={"safetensors": ("none", "q8_0")} if name == "llama" else {},
        drafter_kinds={"mtp", "draft-model", "ngram"},
        engine="numpy",
        install_hint=f"pip install {name}",
    )


@pytest.fixture
def host_of(monkeypatch, builtin_data):
    module = types.ModuleType("packing_test_backends")
    for kind in (Torch, Llama, Mlx):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "packing_test_backends", module)

    def make(*names):
        class Plugin:
            @hookimpl
            def polydraft_backends(self):
                yield from map(backend_record, names)

            @hookimpl
            def polydraft_local_models(self):
                for path in sorted(builtin_data.iterdir()):
                    yield LocalModelRecord(name=path.name, path=str(path))

        return PluginHost({"plugin": Plugin})

    return make


@dataclass
class Machine:
    """What is loaded with so many bytes free."""

    host: PluginHost
    monkeypatch: pytest.MonkeyPatch

    def request(self, target=TARGET, *, free=10**9, **arguments):
        self.monkeypatch.setattr("polydraft.hardware.free_memory", lambda: free)
        return prepare(target, **{"context_length": 16, "host": self.host, **arguments}).request

    def packing(self, *args, **arguments):
        return self.request(*args, **arguments).packing


@pytest.fixture
def machine(host_of, monkeypatch):
    return Machine(host_of("torch", "llama", "mlx"), monkeypatch)


@pytest.fixture
def hub(fake_hub, builtin_data):
    """E4B with its packings: weights of no meaning, of sizes as those of real ones relate."""
    config = (builtin_data / "tiny-e2b/config.json").read_bytes()
    assistant = (builtin_data / "tiny-e2b-assistant/config.json").read_bytes()
    small = {"config.json": assistant, "model.safetensors": bytes(1000)}
    fake_hub.add(TARGET, {"config.json": config, "model.safetensors": bytes(160_000), "README.md": b"x"})
    fake_hub.add(f"{TARGET}-assistant", small)
    fake_hub.add("mlx-community/gemma-4-E4B-it-assistant-bf16", small)
    for name, size in SIZES.items():
        fake_hub.add(f"{MLX}-{name}", {"config.json": config, "model.safetensors": bytes(size)})
    files = {f"gemma-4-E4B-it-{name}.gguf": bytes(size) for name, size in FILES.items() if name != "BF16"}
    parts = {f"BF16/gemma-4-E4B-it-BF16-0000{i}-of-00002.gguf": bytes(80_000) for i in (1, 2)}
    others = {"mmproj-BF16.gguf": bytes(9000), "MTP/mtp-gemma-4-E4B-it-BF16.gguf": bytes(1000)}
    fake_hub.add(GGUF, {**files, **parts, **others})
    fake_hub.add(QAT, {"gemma-4-E4B-it-qat-q4_0.gguf": bytes(47_000), "mtp-gemma-4-E4B-it.gguf": bytes(1000)})
    fake_hub.add("unsloth/gemma-4-E4B-it-qat-GGUF", {"gemma-4-E4B-it-qat-BF16.gguf": bytes(160_000)})
    return fake_hub


# --- the registry's data ---------------------------------------------------------------------------------------------
def test_every_packing_has_a_pair_of_its_format_and_a_target_that_is_known():
    pairs, packings = PairRegistry.of(PluginHost({})), PackingRegistry.load()
    assert len(packings.entries) == 5 * 8 + 5 + 5 + 4 + 2
    for entry in packings.entries:
        assert {pair.pair.format for pair in pairs.find(entry.repo)} == {entry.format}, entry.repo
        assert {pair.pair.format for pair in pairs.find(entry.target)} == {"safetensors"}, entry.target
        assert not any(mark in f"{entry.repo}{entry.target}{entry.quantization}" for mark in "{},")
        assert not entry.quantization or bits(entry.quantization) > 0


def test_what_the_pairs_know_as_packings_of_gemma_4_is_in_the_registry():
    repos = {entry.repo for entry in PackingRegistry.load().entries}
    for entry in PairRegistry.of(PluginHost({})).entries:
        pair = entry.pair
        assert pair.target in repos or pair.format == "safetensors", pair.target


@pytest.mark.parametrize("backend", FORMATS)
def test_each_target_of_the_registry_has_an_answer_or_a_reason(fake_hub, machine, builtin_data, backend):
    config = (builtin_data / "tiny-e2b/config.json").read_bytes()
    pairs = PairRegistry.of(PluginHost({}))
    targets = {entry.pair.target for entry in pairs.entries if entry.pair.format == "safetensors"}
    said = {}
    for target in sorted(targets):
        fake_hub.add(target, {"config.json": config, "model.safetensors": bytes(1000)})
        for entry in PackingRegistry.load().find(target):
            files = {f"m-{entry.quantization or 'Q4_K_M'}.gguf": bytes(500)}
            fake_hub.add(entry.repo, files if entry.format == "gguf" else {"config.json": config, "m.safetensors": b""})
        try:
            packing = machine.packing(target, backend=backend, drafter=None)
        except UnsupportedError as error:
            said[target] = error.message
        else:
            assert packing.format in FORMATS[backend]
            assert packing.of == target
    assert all("converts safetensors weights of this machine only" in message for message in said.values())
    assert set(said) == ({one for one in targets if "gemma-4" not in one} if backend == "llama" else set())


def test_a_users_own_packings(tmp_path, monkeypatch, fake_hub, machine, builtin_data):
    file = tmp_path / "pairs.toml"
    file.write_text('[[packing]]\ntarget = "my/big"\nrepo = "my/big-GGUF"\nformat = "gguf"\n')
    monkeypatch.setenv("POLYDRAFT_PAIRS", str(file))
    fake_hub.add("my/big", {"config.json": (builtin_data / "tiny-e2b/config.json").read_bytes()})
    fake_hub.add("my/big-GGUF", {"big-F16.gguf": bytes(100)})
    assert machine.packing("my/big", backend="llama", drafter=None).source == "my/big-GGUF/big-F16.gguf"
    file.write_text('[[packing]]\ntarget = "my/big"\nrepo = "my/{a,b}-GGUF"\nformat = "gguf"\nbytes = 3\n')
    with pytest.raises(InvalidRequestError, match="number 1 is wrong: an entry with a size"):
        machine.packing("my/big", backend="llama")
    file.write_text('[[packing]]\ntarget = "my/big"\n')
    with pytest.raises(InvalidRequestError, match=r"line 1: \[\[packing\]\] number 1 is wrong: repo"):
        machine.packing("my/big", backend="llama")


# --- one name, every engine ------------------------------------------------------------------------------------------
def test_each_backend_gets_its_own_packing(hub, machine):
    assert machine.packing(backend="torch").source == TARGET
    assert machine.packing(backend="mlx").source == f"{MLX}-bf16"
    found = machine.packing(backend="llama")
    assert found.source == f"{GGUF}/BF16/gemma-4-E4B-it-BF16-00001-of-00002.gguf"
    assert (found.name, found.of, found.bytes, found.quantized) == ("bf16", TARGET, 160_000, False)
    assert (found.chosen_by, found.rejected, found.converted) == ("auto", (), False)


def test_the_drafter_follows(hub, machine):
    plans = {name: machine.request(backend=name).plan for name in FORMATS}
    assert plans["torch"].drafter.id == f"{TARGET}-assistant"
    assert plans["mlx"].drafter.id == "mlx-community/gemma-4-E4B-it-assistant-bf16"
    assert (plans["llama"].drafter.id, plans["llama"].drafter.file) == (GGUF, "MTP/mtp-gemma-4-E4B-it-BF16.gguf")
    assert {plan.num_speculative_tokens for plan in plans.values()} == {4}
    named = machine.request(backend="llama", drafter=f"{TARGET}-assistant", quantization="q4_0").plan
    assert (named.kind, named.drafter.id, named.drafter.file) == ("mtp", QAT, "mtp-gemma-4-E4B-it.gguf")


@pytest.mark.parametrize(
    ("quantization", "backend", "source"),
    [
        ("none", "llama", f"{GGUF}/BF16/gemma-4-E4B-it-BF16-00001-of-00002.gguf"),
        ("bf16", "llama", f"{GGUF}/BF16/gemma-4-E4B-it-BF16-00001-of-00002.gguf"),
        ("q4_0", "llama", f"{QAT}/gemma-4-E4B-it-qat-q4_0.gguf"),
        ("Q4_K_M", "llama", f"{GGUF}/gemma-4-E4B-it-Q4_K_M.gguf"),
        ("q4_k_xl", "llama", f"{GGUF}/gemma-4-E4B-it-UD-Q4_K_XL.gguf"),
        ("ud-q4_k_xl", "llama", f"{GGUF}/gemma-4-E4B-it-UD-Q4_K_XL.gguf"),
        ("8bit", "mlx", f"{MLX}-8bit"),
        ("4-bit", "mlx", f"{MLX}-4bit"),
        ("none", "mlx", f"{MLX}-bf16"),
        ("none", "torch", TARGET),
        ("bf16", "torch", TARGET),
        ("q8_0", "auto", f"{GGUF}/gemma-4-E4B-it-Q8_0.gguf"),
        ("mxfp8", "auto", f"{MLX}-mxfp8"),
    ],
)
def test_by_name(hub, machine, quantization, backend, source):
    found = machine.packing(backend=backend, quantization=quantization)
    assert (found.source, found.chosen_by) == (source, "caller")


def test_unknown_names(hub, machine):
    with pytest.raises(InvalidRequestError, match=r"has no weights for `quantization='q4_k_n'`") as error:
        machine.packing(backend="llama", quantization="q4_k_n")
    assert "Did you mean 'q4_k_m'" in error.value.hint
    assert "q8_0" in error.value.hint
    assert error.value.argument == "quantization"
    with pytest.raises(
        UnsupportedError, match=r"torch loads no weights of .* for `quantization='q4_0'`.*gguf"
    ) as refused:
        machine.packing(backend="torch", quantization="q4_0")
    assert "It loads: none." in refused.value.hint
    for wrong in (4, "", None):
        with pytest.raises(InvalidRequestError, match="quantization"):
            machine.packing(quantization=wrong)


def test_a_named_packing_is_taken_as_it_is(hub, machine):
    for free in (10, 10**9):
        found = machine.packing(QAT, backend="llama", free=free)
        assert (found.source, found.name, found.chosen_by) == (f"{QAT}/gemma-4-E4B-it-qat-q4_0.gguf", "q4_0", "caller")
        # As llama.cpp: a repository's id alone is its Q4_K_M file.
        assert machine.packing(GGUF, backend="llama", free=free).name == "q4_k_m"
        assert machine.packing(f"{GGUF}:Q2_K", backend="llama", free=free).name == "q2_k"
        assert machine.packing(f"{MLX}-4bit", backend="mlx", free=free).name == "4bit"
    assert machine.packing(GGUF, backend="llama", quantization="q6_k").source == f"{GGUF}/gemma-4-E4B-it-Q6_K.gguf"


@pytest.mark.parametrize(
    ("target", "quantization", "backend"),
    [
        (f"{GGUF}:Q2_K", "q8_0", "llama"),
        (f"{GGUF}/gemma-4-E4B-it-Q8_0.gguf", "none", "llama"),
        (QAT, "q8_0", "llama"),
        (f"{MLX}-4bit", "8bit", "mlx"),
        (f"{MLX}-bf16", "4bit", "mlx"),
    ],
)
def test_contradictions(hub, machine, target, quantization, backend):
    with pytest.raises(InvalidRequestError, match=f"`quantization='{quantization}'` contradicts") as error:
        machine.packing(target, quantization=quantization, backend=backend)
    assert f"or load {TARGET} with it" in error.value.hint


def test_a_revision_is_that_of_one_repository(hub, machine):
    with pytest.raises(UnsupportedError, match="not of the Hub"):
        machine.packing(backend="llama", revision="main")
    assert machine.packing(backend="mlx", revision="main").source == TARGET


def test_repositories_that_cannot_be_asked(hub, machine, monkeypatch):
    hub.fail(GGUF, 404, "RepoNotFound")
    found = machine.packing(backend="llama")
    assert found.source == f"{QAT}/gemma-4-E4B-it-qat-q4_0.gguf"
    assert "There is no model" in " ".join(one.why for one in found.rejected if one.source == GGUF)
    hub.fail(GGUF, 503)  # it may have the full weights: nobody is given quantized ones for a passing failure
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ModelNotFoundError, match="HTTP 503"):
        machine.packing(backend="llama")
    assert machine.packing(backend="llama", quantization="q4_0").name == "q4_0"
    assert machine.request().backend == "torch"  # has the full weights, and needs no other repository
    hub.fail(f"{MLX}-bf16", 404, "RepoNotFound")
    found = machine.packing(backend="mlx")
    assert found.source == TARGET
    assert [one.source for one in found.rejected] == [f"{MLX}-bf16"]


def test_a_repository_of_several_models(hub, machine):
    hub.add("my/models-GGUF", {"a-Q8_0.gguf": b"x", "b-Q8_0.gguf": b"y"})
    request = machine.request("my/models-GGUF", backend="llama", drafter=None)
    assert (request.target.id, request.target.file) == ("my/models-GGUF", None)  # fetching it says what is there
    hub.add("my/model-GGUF", {"a-Q8_0.gguf": bytes(80_000), "a-F16.gguf": bytes(160_000)})
    assert machine.packing("my/model-GGUF", backend="llama", drafter=None).name == "f16"
    assert machine.packing("my/model-GGUF", backend="llama", drafter=None, free=115_000).name == "q8_0"


def test_a_target_that_cannot_be_listed_is_loaded_all_the_same(hub, machine, monkeypatch):
    def fail(*args, **arguments):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.list_repo_tree", fail)
    found = machine.packing(backend="torch", free=10)
    assert (found.source, found.bytes) == (TARGET, None)


# --- memory ----------------------------------------------------------------------------------------------------------
def test_the_best_that_fits(hub, machine):
    found = machine.packing(backend="llama", free=115_000)
    assert (found.name, found.chosen_by) == ("q8_0", "auto")
    why = {one.name: one.why for one in found.rejected}
    assert "with a context of 16 tokens, and this machine has 112.3 KiB free" in why["bf16"]
    assert found.note.startswith(f"The weights of {TARGET} are {GGUF}/gemma-4-E4B-it-Q8_0.gguf (quantized, q8_0)")
    assert machine.packing(backend="mlx", free=115_000).name == "8bit"
    # The context counts.
    assert machine.packing(backend="llama", free=115_000, context_length=64).name == "q6_k"


def test_nothing_fits(hub, machine):
    with pytest.raises(OutOfMemoryError, match=r"No weights .* fit: even .*Q2_K\.gguf .q2_k. needs .* 9\.8 KiB free"):
        machine.packing(backend="llama", free=10_000)
    with pytest.raises(OutOfMemoryError, match=f"{TARGET} .none. does not fit: it needs"):
        machine.packing(backend="torch", free=115_000)
    with pytest.raises(OutOfMemoryError, match=r"No weights .* fit: even .*BF16"):
        machine.packing(backend="llama", free=115_000, quantization="none")
    with pytest.raises(OutOfMemoryError, match="No installed backend can load"):
        machine.packing(free=10_000)
    assert not any(name.endswith((".safetensors", ".gguf")) for _, name in hub.requests)


def test_a_backend_that_has_room_for_the_full_weights_comes_first(hub, machine, monkeypatch):
    monkeypatch.setattr(
        Llama, "devices", (DeviceRecord(name="cpu"), DeviceRecord(name="cuda:0", free_memory_bytes=115_000))
    )
    request = machine.request()
    assert (request.backend, request.packing.name) == ("torch", "none")
    # Where none has, the one of the most bits, and of these the one of the highest rank.
    request = machine.request(free=110_000)
    assert (request.backend, request.packing.name) == ("llama", "q8_0")
    with pytest.raises(OutOfMemoryError, match=r"cuda:0 has 112\.3 KiB free") as error:
        machine.packing(backend="llama", quantization="none")
    assert "`device='cpu'`" in error.value.hint
    assert machine.packing(backend="llama", quantization="none", device="cpu").name == "bf16"


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "dtype": "bfloat16",
}


def test_the_memory_of_a_device():
    cards = [DeviceRecord(name=f"cuda:{index}", free_memory_bytes=10 + index) for index in (0, 1)]
    found = Diagnosis(usable=True, devices=(DeviceRecord(name="cpu", free_memory_bytes=7), *cards))
    for device, memory in (
        ("auto", Memory(21, "cuda:0 and cuda:1")),
        ("cuda", Memory(21, "cuda:0 and cuda:1")),
        ("cuda:0", Memory(10, "cuda:0")),
        ("cuda:1", Memory(11, "cuda:1")),
    ):
        assert memory_of(found, device) == memory
    assert memory_of(found, "cpu").place == memory_of(None, "auto").place == "this machine"
    unknown = Diagnosis(usable=True, devices=(DeviceRecord(name="mps"),))
    assert memory_of(unknown, "auto") == Memory(None, "mps")


@settings(deadline=None, max_examples=150)
@given(
    free=st.lists(st.integers(1, 250_000), min_size=2, max_size=5),
    backend=st.sampled_from(["llama", "mlx", "torch"]),
    context=st.integers(1, 500),
)
def test_more_memory_never_gives_a_more_quantized_packing(free, backend, context):
    listings = {f"{MLX}-{name}": {"model.safetensors": size} for name, size in SIZES.items()}
    listings[GGUF] = {f"gemma-4-E4B-it-{name}.gguf": size for name, size in FILES.items()}
    listings |= {TARGET: {"model.safetensors": 160_000}, QAT: {"gemma-4-E4B-it-qat-q4_0.gguf": 47_000}}
    offers = Offers(PackingRegistry.load(environ={}), HubOptions(), lambda name: None)
    offers.listing = lambda repo, revision=None: listings.get(repo, {})
    target = ModelSource(id=TARGET, kind="hub", format="safetensors", config=CONFIG)
    record = backend_record(backend)
    kv = 2 * 2 * 8 * 2 * context
    levels = []
    for bytes_free in sorted(free):
        choice = PackingChoice(target, offers, record, Memory(bytes_free), context_length=context)
        found = next(iter(choice), None)
        levels.append(found.level if found else 0)
        if found is None:
            assert isinstance(choice.error(), OutOfMemoryError)
            fitting = [offer for offer in choice.usable if offer.bytes and 1.1 * offer.bytes + kv <= bytes_free]
            assert all(offer.problem for offer in fitting)
        else:
            assert 1.1 * found.bytes + kv <= bytes_free + 1
            assert found.quantized or bytes_free > 1.1 * 160_000
            # Nobody is given quantized weights where the full ones fit.
            assert not found.quantized or bytes_free < 1.1 * 160_000 + kv
    assert levels == sorted(levels)


# --- on this machine -------------------------------------------------------------------------------------------------
@pytest.fixture
def write_gguf(tmp_path, gguf_bytes):
    def write(name, file_type, padding=0, **metadata):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        header = {"general.architecture": "gemma4", "general.file_type": file_type, "gemma4.embedding_length": 128}
        path.write_bytes(gguf_bytes({**header, **metadata}) + bytes(padding))
        return path

    return write


def test_a_folder_of_several_quantizations(machine, write_gguf, tmp_path):
    for name, number, size in (("Q8_0", 7, 80_000), ("Q4_K_M", 15, 40_000), ("BF16", 32, 160_000)):
        write_gguf(f"models/m-{name}.gguf", number, size)
    folder = tmp_path / "models"
    assert machine.packing(folder, backend="llama", drafter=None).name == "bf16"
    found = machine.packing(str(folder), backend="llama", drafter=None, free=115_000)
    assert (found.name, found.source) == ("q8_0", str(folder / "m-Q8_0.gguf"))
    assert [one.name for one in found.rejected] == ["bf16"]
    assert machine.packing(folder, backend="llama", drafter=None, quantization="Q4_K_M").name == "q4_k_m"
    with pytest.raises(InvalidRequestError, match="has no weights") as error:
        machine.packing(folder, backend="llama", quantization="q4_k_s")
    assert "Did you mean 'q4_k_m'" in error.value.hint
    with pytest.raises(OutOfMemoryError, match="No weights of"):
        machine.packing(folder, backend="llama", free=1000)
    write_gguf("models/other-Q8_0.gguf", 7)
    with pytest.raises(PolydraftError, match="holds 4 models"):
        machine.packing(folder, backend="llama")


def test_the_header_says_more_than_the_name(machine, write_gguf, tmp_path):
    path = write_gguf("model.gguf", 15)
    assert machine.packing(path, backend="llama", drafter=None).name == "q4_k_m"
    with pytest.raises(InvalidRequestError, match="contradicts"):
        machine.packing(path, backend="llama", quantization="q8_0")


def test_a_checkpoint_with_gguf_files(machine, write_gguf, tmp_path, builtin_data):
    import shutil

    folder = tmp_path / "my-model"
    shutil.copytree(builtin_data / "tiny-e2b", folder)
    assert machine.packing(folder, backend="torch", drafter=None).source == str(folder)
    converted = machine.packing(folder, backend="llama", drafter=None)
    assert (converted.source, converted.converted, converted.name) == (str(folder), True, "none")
    config_sizes = {"gemma4.embedding_length": machine.request(folder, drafter=None).target.config["hidden_size"]}
    write_gguf("my-model/my-model-Q4_K_M.gguf", 15, 100, **config_sizes)
    # The full weights, converted, before quantized ones that are there.
    assert machine.packing(folder, backend="llama", drafter=None).converted
    assert machine.packing(folder, backend="llama", drafter=None, quantization="q4_k_m").name == "q4_k_m"
    beside = write_gguf("my-model-BF16.gguf", 32, 100, **config_sizes)
    found = machine.packing(folder, backend="llama", drafter=None)
    assert (found.source, found.converted) == (str(beside), False)
    write_gguf("my-model-BF16.gguf", 32, 100, **{"gemma4.embedding_length": 7})  # of another model
    assert machine.packing(folder, backend="llama", drafter=None).converted
    assert machine.packing(folder, backend="torch", drafter=None).source == str(folder)


def test_conversion(machine, builtin_data):
    request = machine.request("builtin:tiny-e2b", backend="llama")
    assert (request.packing.converted, request.packing.quantized, request.dtype) == (True, False, "auto")
    request = machine.request("builtin:tiny-e2b", backend="llama", quantization="q8_0")
    assert (request.packing.name, request.dtype, request.packing.quantized) == ("q8_0", "q8_0", True)
    request = machine.request("builtin:tiny-e2b", backend="llama", dtype="q8_0")
    assert (request.packing.name, request.dtype) == ("q8_0", "q8_0")
    with pytest.raises(InvalidRequestError, match="contradicts"):
        machine.request("builtin:tiny-e2b", backend="torch", quantization="q9")
    with pytest.raises(UnsupportedError, match="loads no weights") as error:
        machine.request("builtin:tiny-e2b", backend="torch", quantization="q8_0")
    assert "`backend='llama'`" in error.value.hint
    assert machine.request("builtin:tiny-e2b", quantization="q8_0").backend == "llama"
    size = (builtin_data / "tiny-e2b/model.safetensors").stat().st_size
    assert machine.packing("builtin:tiny-e2b", backend="llama", free=size).name == "q8_0"
    assert machine.packing("builtin:tiny-e2b", backend="torch", free=size).name == "none"  # the engine's own check
