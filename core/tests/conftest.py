"""Fixtures: a clean environment, models on disk, a Hub on this machine, backends with a defect."""

import hashlib
import json
import os
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from polydraft._origin import Origin

sys.path.insert(0, str(Path(__file__).parent))  # for the modules next to this file
# As in an activated environment: hints say `pip`, and not which.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

BUILTIN_DATA = Path(__file__).parents[2] / "builtin_pairs/src/polydraft_builtin_pairs/data"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_environments(monkeypatch, tmp_path_factory):
    """None of the user's own environments of engines."""
    monkeypatch.delenv("POLYDRAFT_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "data-home"))


@pytest.fixture(autouse=True)
def hints_of_the_index(monkeypatch):
    """Commands in hints are as polydraft from the package index shows them, not from this clone."""
    monkeypatch.setattr("polydraft._pip_command.origin", lambda: Origin("index"))


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    """No user settings, no user files, no network."""
    for name in ("POLYDRAFT_PAIRS", "POLYDRAFT_DISABLE_PLUGINS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config-home"))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache-home" / name)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


@pytest.fixture(scope="session")
def builtin_data():
    """The folder with the trained pairs of this repository."""
    return BUILTIN_DATA


def safetensors_bytes(metadata=None, size=16):
    """A whole safetensors file with one tensor of ``size`` bytes."""
    header = {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    if metadata:
        header["__metadata__"] = metadata
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


@pytest.fixture
def make_model(tmp_path):
    """Write a model folder: config, weights of no meaning, and a tokenizer if given."""

    def make(name, config, *, tokenizer=None, metadata=None, weights=True):
        folder = Path(name) if Path(name).is_absolute() else tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            (folder / "model.safetensors").write_bytes(safetensors_bytes(metadata))
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return folder

    return make


class FakeHub:
    """Repositories by id: files by name, or an error that the server answers with."""

    def __init__(self):
        self.repos = {}
        self.errors = {}
        self.requests = []

    def add(self, repo, files):
        self.repos[repo] = {
            name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in files.items()
        }

    def fail(self, repo, status, code="", message=""):
        self.errors[repo] = (status, code, message)


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0].strip("/")
            # Whether the Hub answers, and what huggingface_hub itself asks for once a day.
            if path not in {"robots.txt", "api/agent-harnesses"}:
                hub.requests.append((self.command, path))
            api = path.startswith("api/models/")
            parts = (path.removeprefix("api/models/") if api else path).split("/")
            repo = "/".join(parts[:2])
            if repo in hub.errors:
                status, code, message = hub.errors[repo]
                return self.answer(status, X_Error_Code=code, X_Error_Message=message)
            files = hub.repos.get(repo)
            if files is None:
                return self.answer(404, X_Error_Code="RepoNotFound")
            revision = parts[3] if len(parts) > 3 else "main"
            if revision not in {"main", COMMIT}:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if api:
                return self.api(repo, files, "tree" in parts[2:3])
            name = "/".join(parts[4:])
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{etag}"')

        do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

        def api(self, repo, files, tree):
            if tree:
                listing = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    return Handler


@pytest.fixture
def fake_hub(clean_environment, monkeypatch):
    """A Hub of our own on this machine, reached through the real ``huggingface_hub``."""
    import huggingface_hub.constants
    import huggingface_hub.file_download
    import huggingface_hub.hf_api

    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("polydraft.checkpoints._reach._known", {})
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # versions before 1.0 copy the constant
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def gguf_value(value):
    """A metadata value with its type, as GGUF writes it."""
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II" if value >= 0 else "<Ii", 4 if value >= 0 else 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    items = [gguf_value(item) for item in value]
    return struct.pack("<I4sQ", 9, items[0][:4], len(items)) + b"".join(item[4:] for item in items)


@pytest.fixture
def gguf_bytes():
    """A function that makes a GGUF file of metadata and one tensor of four floats."""

    def make(metadata=None):
        pairs = {"general.architecture": "gemma4"} if metadata is None else metadata
        parts = [b"GGUF", struct.pack("<IQQ", 3, 1, len(pairs))]
        for key, value in pairs.items():
            parts += [struct.pack("<Q", len(key)), key.encode(), gguf_value(value)]
        parts.append(struct.pack("<Q8sIQIQ", 8, b"x.weight", 1, 4, 0, 0))
        head = b"".join(parts)
        return head + b"\0" * (-len(head) % 32) + struct.pack("<4f", 1, 2, 3, 4)

    return make


@pytest.fixture
def broken(monkeypatch):
    """Give the reference engine a defect: a class of ``defects``."""
    from polydraft_reference.engine import ReferenceEngine

    made = ReferenceEngine.__init__

    def put(sequence_class):
        monkeypatch.setattr(ReferenceEngine, "sequence_class", sequence_class)
        said = {name: value for name in ("dtype", "device") if (value := getattr(sequence_class, name, None))}
        if said:

            def init(self, target, drafter, running):
                made(self, target, drafter, running.model_copy(update=said))

            monkeypatch.setattr(ReferenceEngine, "__init__", init)

    return put
