"""Passwords of package indexes are on no command line: not on that of pip or uv, nor of what these start."""

import base64
import http.server
import netrc
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from polydraft._environments import store, tools
from polydraft._environments.credentials import in_a_file, in_a_netrc
from polydraft._environments.install import install, update
from polydraft._environments.runner import child_environ
from polydraft._environments.tools import Pip, Uv
from polydraft.errors import InvalidRequestError

PASSWORD = "pa ss#w0rd\\"
WRITTEN = "pa%20ss%23w0rd%5C"
INDEX, EXTRA = f"https://user:{WRITTEN}@index.invalid/simple", f"https://{WRITTEN}@other.invalid:8443/simple"


@pytest.fixture
def set_by_pip(monkeypatch):
    """A function: set these variables of pip, which uv is given, too."""
    pytest.importorskip("pip", reason="pip tells its settings")
    for name in [name for name in os.environ if name.startswith(("UV_", "PIP_"))] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # not this machine's settings
    tools._settings_of_pip.cache_clear()

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield put
    tools._settings_of_pip.cache_clear()


def test_what_uv_is_started_with(uv, data, silent, quick, set_by_pip):
    set_by_pip(PIP_INDEX_URL=INDEX, PIP_EXTRA_INDEX_URL=f"{EXTRA} https://open.invalid/simple", PIP_FIND_LINKS="wheels")
    package = f"the-plugin @ https://token-{WRITTEN}@host.invalid/the_plugin-1.0-py3-none-any.whl"
    environment, _ = install("mine", silent, packages=(package,))
    assert WRITTEN not in str(uv.calls)
    installing = [call for call in uv.calls if call[:2] == ["pip", "install"]]
    assert all("https://open.invalid/simple" in call for call in installing)
    ((mode, text),) = uv.files
    assert mode == 0o600
    assert {*text.splitlines()} == {f"--index-url {INDEX}", f"--extra-index-url {EXTRA}", package}
    folder = store.engine_folder("mine")
    assert [file.name for file in folder.rglob("*") if file.is_file() and WRITTEN in file.read_text("latin-1")] == [
        "state.json"
    ]
    assert stat.S_IMODE((folder / "state.json").stat().st_mode) == 0o600  # `update` needs the package
    assert update("mine", silent, again=True)[0].packages == environment.packages
    assert WRITTEN not in str(uv.calls)


def test_a_state_without_a_password_is_as_readable_as_any_file(uv, data, silent, quick):
    install("reference", silent)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((store.engine_folder("reference") / "state.json").stat().st_mode) == 0o666 & ~mask


def test_git_would_show_it(uv, data, silent):
    for package in (f"x @ git+https://user:{WRITTEN}@host/x", f"x @ git+https://{WRITTEN}@host/x@main"):
        with pytest.raises(InvalidRequestError, match="git shows it to other users") as error:
            install("mine", silent, packages=(package,))
        assert WRITTEN not in str(error.value)
    assert uv.calls == []


def test_a_netrc_file_for_what_pip_starts(tmp_path, set_by_pip, monkeypatch):
    python = Path(sys.executable)
    set_by_pip(PIP_EXTRA_INDEX_URL="https://open.invalid/simple")
    assert in_a_netrc(python, tmp_path) == {}
    own = tmp_path / "own"
    own.write_text("machine index.invalid login old password old\nmachine own.invalid login a password b\n")
    set_by_pip(PIP_INDEX_URL=INDEX, PIP_EXTRA_INDEX_URL=f"{EXTRA} https://open.invalid/simple", NETRC=str(own))
    found = in_a_netrc(python, tmp_path)
    assert found.pop("PIP_INDEX_URL") == "https://index.invalid/simple"
    assert found.pop("PIP_EXTRA_INDEX_URL") == "https://other.invalid:8443/simple https://open.invalid/simple"
    file = Path(found.pop("NETRC"))
    assert found == {}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    told = netrc.netrc(file)
    assert told.authenticators("index.invalid")[::2] == ("user", PASSWORD)
    assert told.authenticators("other.invalid")[::2] == (PASSWORD, "")
    assert told.authenticators("own.invalid")[::2] == ("a", "b")
    set_by_pip(PIP_EXTRA_INDEX_URL="https://other:password@index.invalid/more")  # a host with two passwords
    assert in_a_netrc(python, tmp_path) == {}


BACKEND = """
import pathlib, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        for file, text in {files!r}.items():
            wheel.writestr(file, text)
    return name
"""


def wheel_files(name, **modules):
    info = f"{name}-1.0.dist-info"
    return {
        **{f"{module}.py": text for module, text in modules.items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }


@pytest.fixture
def index(tmp_path):
    """An index of one build backend, for ``user`` and the password: its URL, and the command lines that it has seen."""
    wheel = tmp_path / "backend_of_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        backend = BACKEND.format(files=wheel_files("thing", thing=""))
        for file, text in wheel_files("backend_of_thing", backend_of_thing=backend).items():
            archive.writestr(file, text)
    lines = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            lines.update(command_lines())
            wanted = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
            if self.headers.get("Authorization") != f"Basic {wanted}":
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic realm=index")
                self.end_headers()
                return
            page = f'<a href="/files/{wheel.name}">{wheel.name}</a>'.encode()
            body = wheel.read_bytes() if self.path.startswith("/files/") else page
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if body[:2] == b"PK" else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:{WRITTEN}@127.0.0.1:{server.server_port}/simple", lines
    server.shutdown()
    server.server_close()


def command_lines():
    """The arguments of all processes of this machine, as any user may read them."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue


def uv_program():
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.is_file() else shutil.which("uv")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes tell their arguments in /proc")
@pytest.mark.parametrize("program", ["pip", "uv"])
def test_no_process_shows_it(program, index, tmp_path, set_by_pip):
    url, lines = index
    if program == "uv" and uv_program() is None:
        pytest.skip("uv is not installed")
    set_by_pip(PIP_INDEX_URL=url)
    tool = Pip() if program == "pip" else Uv(uv_program())
    source, folder, private = tmp_path / "thing", tmp_path / "environment", tmp_path / "private"
    for new in (source, private):
        new.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["backend_of_thing"]\nbuild-backend = "backend_of_thing"\n'
        '[project]\nname = "thing"\nversion = "1.0"\n'
    )
    (tmp_path / "constraints.txt").touch()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, env=child_environ())
    python = tools.python_of(folder)

    def run(command, **variables):
        environ = child_environ(python, UV_CACHE_DIR=str(tmp_path / "cache"), PIP_NO_CACHE_DIR="1", **variables)
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=120)

    command = tool.install(python, [str(source)], tmp_path / "constraints.txt", indexes=[], wheels=[])
    done = run(in_a_file(command, private), **(in_a_netrc(python, private) if program == "pip" else {}))
    assert done.returncode == 0, done.stderr
    assert any(str(source) in line for line in lines)
    assert not [line for line in lines if WRITTEN in line]
    assert run([python, "-c", "import thing"]).returncode == 0
    # So it would be otherwise.
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    run([*command, *(["--reinstall"] if program == "uv" else ["--force-reinstall"])])
    assert [line for line in lines if WRITTEN in line]
