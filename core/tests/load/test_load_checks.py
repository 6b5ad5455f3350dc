"""``load``: everything wrong is a typed error with a hint, before any backend loads anything."""

import sys
import types
from contextlib import nullcontext
from pathlib import Path

import polydraft
import pytest
from polydraft import load
from polydraft._load import prepare
from polydraft._plugins import PluginHost
from polydraft._registry.backends import format_hint
from polydraft._registry.states import BackendState
from polydraft.contract import (
    Backend,
    BackendRecord,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    EngineOptions,
    FaultRecord,
    LocalModelRecord,
    hookimpl,
)
from polydraft.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    DeviceError,
    EngineError,
    InvalidRequestError,
    ModelFormatError,
    ModelNotFoundError,
    OutOfMemoryError,
    PairMismatchError,
    PluginError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft.secrets import Secret

pytestmark = pytest.mark.usefixtures("clean_environment")


class Options(EngineOptions):
    compile: bool = False
    blocks: int = 1


class Fast(Backend):
    """Usable, of high rank."""

    options = Options
    rank = 80
    calls = 0

    def capabilities(self):
        return Capabilities(drafter_kinds={"mtp", "draft-model", "ngram"}, max_speculative_tokens=8)

    def diagnose(self):
        return Diagnosis(usable=True, rank=self.rank, devices=(DeviceRecord(name="cpu"), DeviceRecord(name="cuda:0")))

    def load_engine(self, request):
        raise AssertionError("nothing may be loaded")


class Exact(Fast):
    """Usable, of low rank, with the exactness that the other has not; no options."""

    options = EngineOptions
    rank = 10

    def capabilities(self):
        return Capabilities(drafter_kinds={"ngram"}, exactness={"standard", "bitwise"})

    def diagnose(self):
        return Diagnosis(usable=True, rank=self.rank, devices=(DeviceRecord(name="cpu"),))


class Unusable(Fast):
    def diagnose(self):
        return Diagnosis(usable=False, reason="its engine is not installed.", remedy="pip install the-engine", rank=100)


class Refusing(Fast):
    rank = 90

    def refuse(self, target, plan):
        return f"It knows nothing of {target.model_type}."


class Raising(Fast):
    def diagnose(self):
        raise RuntimeError("no driver")


CLASSES = {"fast": Fast, "exact": Exact, "unusable": Unusable, "refusing": Refusing, "raising": Raising}
KINDS = {"exact": {"ngram"}}


@pytest.fixture
def host_of(monkeypatch, builtin_data):
    module = types.ModuleType("load_test_backends")
    for name, kind in CLASSES.items():
        setattr(module, name.title(), kind)
    monkeypatch.setitem(sys.modules, "load_test_backends", module)

    def make(*names, faults=(), **changes):
        class Plugin:
            @hookimpl
            def polydraft_backends(self):
                for name in names:
                    yield BackendRecord(
                        **{
                            "name": name,
                            "factory": f"load_test_backends:{name.title()}",
                            "summary": "",
                            "formats": {"safetensors"},
                            "drafter_kinds": KINDS.get(name, {"mtp", "draft-model", "ngram"}),
                            "engine": "numpy",
                            "install_hint": f"pip install polydraft-{name}",
                            **changes,
                        }
                    )

            @hookimpl
            def polydraft_local_models(self):
                for path in sorted(builtin_data.iterdir()):
                    yield LocalModelRecord(name=path.name, path=str(path))

            @hookimpl
            def polydraft_faults(self):
                return faults

        return PluginHost({"plugin": Plugin})

    return make


@pytest.fixture
def host(host_of):
    return host_of("fast", "exact", "unusable")


TARGET = "builtin:tiny-e2b"


# --- what works ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gemma4:e2b", "llama3.2", "hf.co/org/name:Q4_K_M", "org/name", " user/model:tag "])
def test_a_servers_own_name_is_passed_on(host_of, name):
    request = prepare(name, host=host_of("fast", own_names=True), backend="fast").request
    assert (request.target.kind, request.target.id, request.target.path) == ("served", name.strip(), None)
    assert (request.plan.kind, request.plan.drafter, request.plan.num_speculative_tokens) == ("mtp", None, 4)


def test_files_and_known_ids_are_no_names_of_a_server(host_of, builtin_data):
    host = host_of("fast", own_names=True)
    for name, kind in (
        (TARGET, "builtin"),
        (str(builtin_data / "tiny-e2b"), "local"),
        (builtin_data / "tiny-e2b", "local"),
    ):
        assert prepare(name, host=host, backend="fast").request.target.kind == kind
    for name in ("google/gemma-4-E2B-it", "./missing"):
        with pytest.raises(ModelNotFoundError):
            prepare(name, host=host, backend="fast")
    with pytest.raises(BackendUnavailableError):
        prepare(TARGET, host=host)
    with pytest.raises(SpeculationUnavailableError):
        prepare(
            "gemma4:e2b", host=host_of("fast", own_names=True, drafter_kinds={"mtp"}), backend="fast", drafter="ngram"
        )


def test_request(host, tmp_path):
    prepared = prepare(
        TARGET,
        backend="fast",
        drafter="builtin:tiny-e2b-assistant",
        num_speculative_tokens=5,
        context_length=512,
        dtype="float32",
        device="cpu",
        cache_dir=str(tmp_path),
        token="hf_canary",
        local_files_only=True,
        trust_remote_code=True,
        engine_options={"compile": True},
        host=host,
    )
    request = prepared.request
    assert prepared.request.backend == "fast"
    assert (request.target.id, request.plan.kind, request.plan.num_speculative_tokens) == (TARGET, "mtp", 5)
    assert (request.context_length, request.dtype, request.device) == (512, "float32", "cpu")
    assert request.trust_remote_code is True
    assert request.engine_options == Options(compile=True)
    assert (request.hub.cache_dir, request.hub.token) == (tmp_path, Secret("hf_canary"))
    assert "hf_canary" not in repr(request)


def test_defaults(host):
    prepared = prepare(TARGET, host=host)
    assert prepared.request.backend == "fast"
    assert (prepared.request.plan.kind, prepared.request.plan.num_speculative_tokens) == ("mtp", 4)
    assert prepared.request.engine_options == Options()
    assert (prepared.request.exactness, prepared.request.dtype, prepared.request.device) == ("standard", "auto", "auto")


def test_plain(host):
    plan = prepare(TARGET, drafter=None, host=host).request.plan
    assert (plan.kind, plan.off.code) == (None, "caller")


def test_folder_and_options_as_a_model(host, builtin_data):
    prepared = prepare(Path(builtin_data / "tiny-31b"), engine_options=Options(blocks=3), backend="fast", host=host)
    assert prepared.request.engine_options.blocks == 3
    assert prepared.request.plan.drafter.path.name == "tiny-31b-assistant"


def test_hub_target(host, fake_hub, builtin_data):
    for name, folder in (("", "tiny-e2b"), ("-assistant", "tiny-e2b-assistant")):
        fake_hub.add(
            f"google/gemma-4-E2B-it{name}", {"config.json": (builtin_data / folder / "config.json").read_bytes()}
        )
    plan = prepare("google/gemma-4-E2B-it", host=host).request.plan
    assert (plan.drafter.id, plan.num_speculative_tokens) == ("google/gemma-4-E2B-it-assistant", 2)


# --- which backend ---------------------------------------------------------------------------------------------------
def test_highest_rank_that_can_do_it(host_of):
    assert prepare(TARGET, host=host_of("exact", "fast", "refusing", "unusable", "raising")).request.backend == "fast"
    assert prepare(TARGET, exactness="bitwise", host=host_of("exact", "fast")).request.backend == "exact"
    assert prepare(TARGET, backend="exact", host=host_of("exact", "fast")).request.backend == "exact"


def test_a_backend_of_rank_0_is_used_only_if_it_is_named(host_of, monkeypatch):
    monkeypatch.setattr(Exact, "rank", 0)
    assert prepare(TARGET, backend="exact", host=host_of("exact", "unusable")).request.backend == "exact"
    with pytest.raises(
        BackendUnavailableError, match=r"pip install the-engine.*The backend exact is used only if it is named"
    ):
        prepare(TARGET, host=host_of("exact", "unusable"))


def test_a_backend_of_rank_0_hides_no_reason_of_the_others(host_of, monkeypatch):
    monkeypatch.setattr(Exact, "rank", 0)
    with pytest.raises(UnsupportedError, match="The backend exact is used only if it is named"):
        prepare(TARGET, exactness="bitwise", host=host_of("exact", "fast"))


def test_a_device_that_no_backend_sees_is_told_in_one_sentence(host_of, monkeypatch):
    for host in (host_of("exact", "fast", "unusable", "raising"), host_of("fast"), host_of("exact", "fast")):
        with pytest.raises(DeviceError) as error:
            prepare(TARGET, device="tpu", host=host)
        assert error.value.message == "There is no device 'tpu' here that this model could run on."
        assert "cpu, cuda:0." in error.value.hint
    with pytest.raises(DeviceError, match="There is no device 'tpu' here"):
        polydraft.tune(TARGET, device="tpu", host=host_of("exact", "fast"))
    # One that is used only if it is named has it.
    monkeypatch.setattr(Exact, "rank", 0)
    with pytest.raises(DeviceError, match="There is no device 'tpu' here"):
        prepare(TARGET, device="tpu", host=host_of("exact", "fast"))
    tpu = Diagnosis(usable=True, rank=0, devices=(DeviceRecord(name="tpu"),))
    monkeypatch.setattr(Exact, "diagnose", lambda self: tpu)
    with pytest.raises(DeviceError, match="The backend exact is used only if it is named"):
        prepare(TARGET, device="tpu", host=host_of("exact", "fast"))


def test_a_device_is_refused_before_the_target_is_looked_for(host_of):
    with pytest.raises(DeviceError, match="sees no device 'tpu'"):
        prepare("org/none", device="tpu", backend="fast", host=host_of("fast"))


def test_equal_ranks_go_by_name(host_of, monkeypatch):
    monkeypatch.setattr(Exact, "rank", 80)
    assert prepare(TARGET, host=host_of("fast", "exact")).request.backend == "exact"


def test_auto_takes_the_one_that_can_run_the_given_drafter(host_of, monkeypatch):
    monkeypatch.setattr(Exact, "rank", 99)
    prepared = prepare(TARGET, drafter="builtin:tiny-e2b-assistant", host=host_of("exact", "fast"))
    assert prepared.request.backend == "fast"


def test_auto_takes_the_one_that_has_the_device(host_of, monkeypatch):
    monkeypatch.setattr(Exact, "rank", 99)
    assert prepare(TARGET, device="cuda", host=host_of("exact", "fast")).request.backend == "fast"


def test_none_can(host_of):
    with pytest.raises(BackendUnavailableError, match="No installed backend can load") as error:
        load(TARGET, host=host_of("unusable", "refusing", "raising"))
    for said in (
        "unusable: The backend unusable cannot run here: its engine is not installed. pip install the-engine",
        "refusing: The backend refusing cannot load this: It knows nothing of gemma4_text.",
        "raising: The backend raising cannot run here: Its diagnosis fails: RuntimeError: no driver.",
    ):
        assert said in error.value.message
    assert "doctor" in error.value.hint


def test_what_is_installed_is_not_to_be_installed(host_of, monkeypatch):
    host = host_of("unusable")
    (record,) = host.backends().values()
    monkeypatch.setattr(Unusable, "diagnose", lambda self: Diagnosis(usable=False, reason="There is no device."))
    with pytest.raises(BackendUnavailableError, match="There is no device") as error:
        load(TARGET, host=host)
    assert record.install_hint not in error.value.hint
    assert "polydraft backends" in error.value.hint
    assert format_hint("safetensors", but="other", installed=[record]) == "Use `backend='unusable'`, which does."
    usual = record.model_copy(update={"name": "transformers"})
    assert "backend='transformers'" in format_hint("safetensors", installed=[record, usual])


def test_the_only_one_cannot(host_of):
    with pytest.raises(BackendUnavailableError, match="engine is not installed") as error:
        load(TARGET, host=host_of("unusable"))
    assert error.value.hint == "pip install the-engine"


def test_none_is_installed():
    with pytest.raises(ModelNotFoundError) as error:
        load(TARGET, host=PluginHost({}))
    assert "polydraft[builtin]" in error.value.hint


@pytest.mark.parametrize("name", ["google/gemma-4-E4B-it", "google/gemma-4-E4B-it@main", "org/unknown"])
def test_without_an_engine_the_hub_is_not_asked(name, host_of, monkeypatch):
    monkeypatch.setattr("polydraft._registry.resolver.resolve", lambda *_, **__: pytest.fail("the Hub was asked"))
    for host in (PluginHost({}), host_of("fast", own_names=True)):
        with pytest.raises(BackendUnavailableError, match="No installed backend loads") as error:
            load(name, host=host)
        assert "polydraft engines install transformers" in error.value.hint


def test_none_loads_the_format(host, tmp_path, gguf_bytes):
    (tmp_path / "m.gguf").write_bytes(gguf_bytes())
    with pytest.raises(BackendUnavailableError, match="format is gguf") as error:
        load(tmp_path / "m.gguf", host=host)
    assert "xllamacpp" in error.value.hint


def test_no_backend_for_safetensors_says_how_to_get_one(builtin_data):
    with pytest.raises(BackendUnavailableError) as error:
        load(builtin_data / "tiny-e2b", host=PluginHost({}))
    assert "polydraft engines install transformers" in error.value.hint


def test_given_backend_and_another_format(host, tmp_path, gguf_bytes):
    (tmp_path / "m.gguf").write_bytes(gguf_bytes())
    with pytest.raises(UnsupportedError, match="format is gguf") as error:
        load(tmp_path / "m.gguf", backend="fast", host=host)
    assert "safetensors" in error.value.hint


@pytest.mark.parametrize(
    ("backend", "error", "said"),
    [
        ("unusable", BackendUnavailableError, "pip install the-engine"),
        ("raising", BackendUnavailableError, "no driver"),
        ("refusing", UnsupportedError, "knows nothing of gemma4_text"),
    ],
)
def test_given_backend_that_cannot(host_of, backend, error, said):
    with pytest.raises(error) as caught:
        load(TARGET, backend=backend, host=host_of("fast", "unusable", "refusing", "raising"))
    assert said in str(caught.value)


def test_broken_factory(host_of):
    broken = host_of("fast", factory="load_test_backends:Nothing")
    with pytest.raises(PluginError, match="Nothing"):
        load(TARGET, backend="fast", host=broken)
    with pytest.raises(BackendUnavailableError, match="Nothing"):
        load(TARGET, host=broken)


@pytest.mark.parametrize(
    ("requires", "said", "hint"),
    [
        ({"numpy": ">=99"}, "it needs numpy >=99; numpy", "pip install 'numpy>=99'"),
        (
            {"no-such-engine": ">=1"},
            "it needs no-such-engine >=1, which is not installed",
            "pip install polydraft-fast",
        ),
        ({"no-such|nor-such": ">=1"}, "it needs no-such or nor-such >=1", "pip install polydraft-fast"),
    ],
)
def test_requirements(host_of, requires, said, hint):
    with pytest.raises(BackendUnavailableError, match=said) as error:
        load(TARGET, backend="fast", host=host_of("fast", requires=requires))
    assert error.value.hint == hint
    prepared = prepare(TARGET, backend="fast", host=host_of("fast", requires={"no-such|numpy": ">=1"}))
    assert prepared.request.backend == "fast"


def fault(**changes):
    fields = {
        "id": "f",
        "distribution": "numpy",
        "versions": ">=1",
        "affects": "all",
        "severity": "refuse",
        "summary": "It breaks.",
        "remedy": "Use another.",
        "link": "https://github.com/x/y/issues/1",
    }
    return FaultRecord(**{**fields, **changes})


def test_faults_of_the_engine(host_of):
    for architectures in ((), ("gemma4_text",)):
        with pytest.raises(BackendUnavailableError, match=r"numpy .* has a known fault: It breaks\.") as error:
            load(TARGET, backend="fast", host=host_of("fast", faults=[fault(architectures=architectures)]))
        assert error.value.hint == "Use another. See https://github.com/x/y/issues/1."
    for harmless in (
        fault(architectures=("llama",)),
        fault(versions="<1"),
        fault(severity="warn"),
        fault(affects="draft-model"),
    ):
        assert prepare(TARGET, backend="fast", host=host_of("fast", faults=[harmless])).request.plan.kind == "mtp"


def test_fault_of_the_drafters_kind(host_of):
    host = host_of("fast", faults=[fault(affects="mtp", architectures=("gemma4_assistant",))])
    plan = prepare(TARGET, host=host).request.plan
    assert plan.kind == "ngram"
    assert "It breaks" in plan.note
    with pytest.raises(BackendUnavailableError, match="It breaks"):
        load(TARGET, drafter="builtin:tiny-e2b-assistant", backend="fast", host=host)


def test_the_log_shows_what_is_passed_over(host_of, caplog):
    host = host_of("refusing", "fast", faults=[fault(affects="mtp", architectures=("gemma4_assistant",))])
    with caplog.at_level("INFO", "polydraft.load"):
        prepare(TARGET, host=host)
    passed_over, *_, chosen = [message for message in caplog.messages if "refusing" in message or "Chosen" in message]
    assert passed_over == (
        "Backend passed over: refusing: The backend refusing cannot load this: It knows nothing of gemma4_text."
    )
    assert any(
        message.startswith("Drafter passed over: builtin:tiny-e2b-assistant: numpy") for message in caplog.messages
    )
    assert chosen.startswith(f"Chosen for {TARGET}: fast; ngram, k=4, chosen by fallback.")


@pytest.mark.parametrize(("device", "known"), [("cuda", True), ("mps", True), ("cuda:1", True), ("vulkan", False)])
def test_a_gpu_of_any_kind_is_the_backends_to_refuse(device, known):
    record = BackendRecord(
        name="apple",
        factory="apple:Backend",
        summary="A.",
        formats=frozenset({"mlx"}),
        drafter_kinds=frozenset({"mtp"}),
        engine="apple",
        install_hint="pip install apple",
    )
    devices = (DeviceRecord(name="gpu"), DeviceRecord(name="cpu"))
    state = BackendState(record=record, diagnosis=Diagnosis(usable=True, devices=devices))
    with nullcontext() if known else pytest.raises(DeviceError, match="It sees: gpu, cpu"):
        state.check_device(device)


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"num_speculative_tokens": 0}, InvalidRequestError, "drafter=None"),
        ({"num_speculative_tokens": -1}, InvalidRequestError, "out of range"),
        ({"num_speculative_tokens": 1000}, InvalidRequestError, "1 to 128"),
        ({"num_speculative_tokens": 9}, InvalidRequestError, "at most 8"),
        ({"num_speculative_tokens": 9, "backend": "fast"}, InvalidRequestError, "=8` or less"),
        ({"num_speculative_tokens": 2.0}, InvalidRequestError, "whole number"),
        ({"num_speculative_tokens": True}, InvalidRequestError, "whole number"),
        ({"num_speculative_tokens": "4"}, InvalidRequestError, "whole number"),
        ({"num_speculative_tokens": "adaptive"}, InvalidRequestError, "or 'auto'"),
        ({"exactness": "exact"}, InvalidRequestError, "'bitwise'"),
        ({"exactness": "bitwise", "backend": "fast"}, UnsupportedError, "no `exactness='bitwise'`"),
        ({"context_length": 0}, InvalidRequestError, "context_length=0"),
        ({"context_length": "8k"}, InvalidRequestError, "context_length='8k'"),
        ({"context_length": True}, InvalidRequestError, "context_length=True"),
        ({"dtype": 32}, InvalidRequestError, "'float32'"),
        ({"dtype": ""}, InvalidRequestError, "'float32'"),
        ({"device": None}, InvalidRequestError, "'cpu'"),
        ({"device": "mps"}, DeviceError, "There is no device 'mps' here"),
        ({"device": "cuda:7", "backend": "fast"}, DeviceError, "It sees: cpu, cuda:0."),
        ({"revision": 3}, InvalidRequestError, "branch, tag or commit"),
        ({"cache_dir": 3}, InvalidRequestError, "a folder"),
        ({"token": 3}, InvalidRequestError, "`token` is of the wrong type"),
        ({"local_files_only": "yes"}, InvalidRequestError, "True or False"),
        ({"trust_remote_code": 1}, InvalidRequestError, "True or False"),
        ({"engine_options": "fast"}, InvalidRequestError, "a dict"),
        ({"engine_options": {5: 1}}, InvalidRequestError, "the key 5"),
        ({"engine_options": {"blocks": 1, None: 1}}, InvalidRequestError, "the key None"),
        ({"engine_options": {"compil": True}, "backend": "fast"}, InvalidRequestError, "Did you mean 'compile'?"),
        ({"engine_options": {"zzzz": True}}, InvalidRequestError, "Known options of fast: blocks, compile."),
        ({"num_speculative_tokens": "many"}, InvalidRequestError, "`num_speculative_tokens='many'` is not understood"),
        ({"engine_options": {"blocks": "many"}}, InvalidRequestError, "The option 'blocks' of fast is wrong"),
        ({"engine_options": {"x": 1}, "backend": "exact"}, InvalidRequestError, "The backend exact has no options."),
        ({"engine_options": Options(), "backend": "exact"}, InvalidRequestError, "takes EngineOptions"),
        ({"host": "plugins"}, InvalidRequestError, "PluginHost"),
        ({"backend": ""}, InvalidRequestError, "backend=''"),
        ({"backend": None}, InvalidRequestError, "backend=None"),
        ({"backend": "fasst"}, BackendNotFoundError, "Did you mean 'fast'?"),
        ({"drafter": ""}, InvalidRequestError, "name is empty"),
        ({"drafter": None, "num_speculative_tokens": 3}, InvalidRequestError, "has no effect with `drafter=None`"),
        ({"assistant_model": "x"}, InvalidRequestError, "Did you mean `drafter`?"),
        ({"qantization": "none"}, InvalidRequestError, "Did you mean `quantization`?"),
        ({"temperature": 0.5}, InvalidRequestError, "`session.generate(prompt, temperature=...)`"),
        ({"drafter": 3}, InvalidRequestError, "'ngram'"),
        ({"drafter": "builtin:tiny-e2b-asistant"}, ModelNotFoundError, "builtin:tiny-e2b-assistant"),
        ({"drafter": "builtin:tiny-31b-assistant"}, PairMismatchError, "hidden size 192"),
        ({"drafter": "builtin:tiny-e2b-assistant", "backend": "exact"}, SpeculationUnavailableError, "kind mtp"),
        ({"target": ""}, InvalidRequestError, "name is empty"),
        ({"target": 3}, InvalidRequestError, "target=3"),
        ({"target": b"x"}, InvalidRequestError, "target="),
        ({"target": "builtin:tiny-e3b"}, ModelNotFoundError, "Did you mean 'builtin:tiny-e2b'"),
        ({"target": "builtin:tiny-e2b-assistant"}, PairMismatchError, "is a drafter"),
        ({"target": "builtin:tiny-e2b-assistant", "drafter": "ngram"}, PairMismatchError, "is a drafter"),
        ({"target": "builtin:tiny-e2b-assistant", "drafter": None}, PairMismatchError, "is a drafter"),
        (
            {"target": "builtin:tiny-e2b-assistant", "drafter": "builtin:tiny-e2b"},
            PairMismatchError,
            "drafter='builtin:tiny-e2b-assistant'",
        ),
        ({"target": "Google/Gemma-4-e4b-it"}, ModelNotFoundError, "Did you mean 'google/gemma-4-E4B-it'?"),
        ({"target": "builtin:Tiny-E2B"}, ModelNotFoundError, "Did you mean 'builtin:tiny-e2b'?"),
        ({"target": "google/gemma-4-E4B-itt"}, ModelNotFoundError, "Did you mean 'google/gemma-4-E4B-it'"),
        ({"target": "./no-such-folder"}, ModelNotFoundError, "no such folder"),
        ({"target": Path(__file__)}, ModelFormatError, "unknown kind"),
        ({"target": Path(__file__).parent}, ModelFormatError, "no config.json"),
    ],
)
def test_bad_input(host, arguments, error, said):
    given = {"target": TARGET, "host": host, **arguments}
    with pytest.raises(error) as caught:
        load(given.pop("target"), **given)
    assert said in str(caught.value)
    assert caught.value.message
    assert caught.value.hint
    if error is InvalidRequestError and set(arguments) != {"target"}:
        assert caught.value.argument in arguments


def test_wrong_options_are_found_before_the_target_is_looked_for(host):
    with pytest.raises(InvalidRequestError, match="no option"):
        load("no/such-model", backend="fast", engine_options={"x": 1}, host=host)


def test_a_broken_user_file_of_pairs(host, monkeypatch, tmp_path):
    (tmp_path / "p.toml").write_text("[[pair]]\n")
    monkeypatch.setenv("POLYDRAFT_PAIRS", str(tmp_path / "p.toml"))
    with pytest.raises(InvalidRequestError, match=r"p\.toml, line 1"):
        load(TARGET, host=host)


def test_all_backends_lack_the_kind_of_the_given_drafter(host_of):
    host = host_of("fast", "exact", drafter_kinds={"ngram"})
    with pytest.raises(SpeculationUnavailableError, match="kind mtp"):
        load(TARGET, drafter="builtin:tiny-e2b-assistant", host=host)


def test_all_backends_lack_the_exactness(host_of, monkeypatch):
    monkeypatch.setattr(Exact, "capabilities", Fast.capabilities)
    with pytest.raises(UnsupportedError, match="no `exactness='bitwise'`"):
        load(TARGET, exactness="bitwise", host=host_of("fast", "exact", "unusable"))


def test_an_unreachable_drafter_is_asked_for_once(host_of, fake_hub, builtin_data, monkeypatch):
    """However many backends are considered."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    config = (builtin_data / "tiny-e2b/config.json").read_bytes()
    fake_hub.add("google/gemma-4-E2B-it", {"config.json": config})
    fake_hub.fail("google/gemma-4-E2B-it-assistant", 403, "GatedRepo")
    prepared = prepare("google/gemma-4-E2B-it", host=host_of("fast", "refusing"))
    assert prepared.request.plan.kind == "ngram"
    asked = [path for _, path in fake_hub.requests if "assistant" in path]
    assert len(asked) == 1


# --- what an engine raises -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verified", ["off", "warn"])
@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (RuntimeError("the weights are\nodd"), EngineError, "fast could not load builtin:tiny-e2b: RuntimeError: the "),
        (KeyError(), EngineError, "KeyError."),
        (MemoryError(), OutOfMemoryError, "Memory ran out"),
        (UnsupportedError("Not this one.", "Another."), UnsupportedError, "Not this one."),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_errors_of_a_load_are_typed(host, monkeypatch, raised, error, said, verified):
    def loads(self, request):
        raise raised

    monkeypatch.setattr(Fast, "load_engine", loads)
    with pytest.raises(error) as caught:
        load(TARGET, backend="fast", host=host, verified=verified)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value is raised or caught.value.__cause__ is raised


@pytest.mark.parametrize("name", ["x" * 5000, "./" + "x" * 5000, Path("x" * 5000), "a/" + "b" * 5000])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_a_name_too_long_for_any_file(host, name, role):
    given = {"target": TARGET, role: name}
    with pytest.raises((ModelNotFoundError, InvalidRequestError)) as caught:
        load(given.pop("target"), host=host, **given)
    assert len(str(caught.value)) < 500
    assert caught.value.hint


@pytest.mark.parametrize("field", ["architectures", "text_config"])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_a_config_of_wrong_types(host, tmp_path, field, role):
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "{field}": 5}}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    given = {"target": TARGET, role: tmp_path}
    with pytest.raises(ModelFormatError, match=f"{field} in config.json of .* is 5, not") as caught:
        load(given.pop("target"), host=host, **given)
    assert caught.value.hint
