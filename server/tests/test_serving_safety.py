"""Keys, hosts, origins, addresses, headers: safe by default, and nothing of the machine in answers."""

import contextlib
import json
import logging
import socket

import pytest
from polydraft.errors import InvalidRequestError
from polydraft.secrets import Secret
from polydraft_server.problems import without_paths
from polydraft_server.run import listen
from polydraft_server.served import public_name
from polydraft_server.settings import ServerSettings, server_settings
from scripted import Script

KEY = "sk-canary-0123456789"


def test_a_key(scripted, caplog):
    caplog.set_level(logging.DEBUG)
    with scripted(key=Secret(KEY)) as server:
        for path in ("/health", "/ready"):
            assert server.get(path).status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer ü"}):
            for done in (server.get("/v1/models", **headers), server.get("/metrics", **headers)):
                assert (done.status, done.error["code"]) == (401, "invalid_api_key")
                assert done.headers["www-authenticate"] == "Bearer"
            assert server.chat(max_tokens=1).status == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert server.get("/v1/models", **right).status == 200
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, **right).status == 200
        # With a key, the name by which it is called does not matter.
        assert server.get("/v1/models", Host="example.org", **right).status == 200
        said = [server.get("/v1/models", Authorization=f"Bearer {KEY}x").body, server.get("/metrics", **right).body]
    assert KEY not in caplog.text + repr(said) + repr(server.api.settings)


def test_only_local_names_without_a_key(scripted):
    """A page of the web may resolve a name of its own to this machine (DNS rebinding)."""
    with scripted() as server:
        for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST:8000"):
            assert server.get("/v1/models", Host=host).status == 200
        for host in ("evil.example", "localhost.evil.example", "evil.example:8000"):
            done = server.get("/v1/models", Host=host)
            assert (done.status, done.error["code"]) == (403, "host_not_allowed")


def test_a_web_page_cannot_send_without_asking(scripted):
    script = Script()
    with scripted(script) as server:
        body = json.dumps({"prompt": "x"}).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            done = server.ask("POST", "/v1/completions", body, Content_Type=kind, Origin="https://evil.example")
            assert done.status == 415
        asked = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
        assert "access-control-allow-origin" not in server.ask("OPTIONS", "/v1/completions", **asked).headers
    assert script.prompts == []


def test_named_origins(scripted):
    with scripted(origins=("https://app.example",), key=Secret(KEY)) as server:
        asked = {
            "Access_Control_Request_Method": "POST",
            "Access_Control_Request_Headers": "authorization,content-type",
        }
        good = server.ask("OPTIONS", "/v1/completions", Origin="https://app.example", **asked)
        assert (good.status, good.headers["access-control-allow-origin"]) == (200, "https://app.example")
        bad = server.ask("OPTIONS", "/v1/completions", Origin="https://evil.example", **asked)
        assert "access-control-allow-origin" not in bad.headers


@pytest.mark.parametrize(
    ("origin", "meant"),
    [
        ("http://x.com/", "http://x.com"),
        ("HTTPS://X.com:8443/a?b", "https://x.com:8443"),
        ("http://x.com:80", "http://x.com"),
        ("https://x.com:443", "https://x.com"),
        ("foo", "scheme://host[:port]"),
        ("", "scheme://host[:port]"),
        ("x.com:80", "scheme://host[:port]"),
        ("https://*.x.com", "scheme://host[:port]"),
        ("https://me@x.com", "scheme://host[:port]"),
    ],
)
def test_origins_that_no_page_has(origin, meant):
    with pytest.raises(InvalidRequestError) as caught:
        server_settings(origins=("https://app.example", origin))
    assert caught.value.hint.startswith(f"Give {meant}")


def test_origins_that_pages_have():
    given = ("*", "null", "http://localhost:3000", "http://[::1]:3000", "https://a-b.example", "chrome-extension://abc")
    assert server_settings(origins=given).origins == given


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_addresses_need_a_key(host):
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    with pytest.raises(InvalidRequestError, match="Set the environment variable POLYDRAFT_API_KEY"):
        listen(ServerSettings(host=host, port=0))
    for allowed in ({"key": Secret(KEY)}, {"no_auth": True}):
        listen(ServerSettings(host=host, port=0, **allowed)).close()


def test_a_key_and_none():
    with pytest.raises(ValueError, match="no_auth has no effect with a key") as error:
        ServerSettings(key=Secret(KEY), no_auth=True)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("name", ["request_seconds", "read_seconds", "write_seconds", "stop_seconds"])
def test_a_time_is_one_that_a_clock_has(name):
    ServerSettings(**{name: 1e8})
    for seconds in (-1, float("inf"), float("nan"), 1e99):
        with pytest.raises(ValueError, match=name):
            ServerSettings(**{name: seconds})


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequestError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen(ServerSettings(port=port))


def test_no_path_of_the_machine(scripted):
    with scripted(target="/srv/models/gemma-4") as server:
        found = server.get("/v1/models")
        assert found.json["data"][0]["id"] == "gemma-4"
        said = [found, server.chat(model="x"), server.chat(max_tokens=2), server.get("/metrics"), server.get("/ready")]
        assert all(b"/srv" not in answer.body for answer in said)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/models/a b/x.gguf is damaged.", "<path> is damaged."),
        ("Look at ~/.cache/polydraft/x.", "Look at <path>."),
        ("C:\\Users\\me\\x.gguf is damaged.", "<path> is damaged."),
        ("See https://example.org/a/b and org/name.", "See https://example.org/a/b and org/name."),
        ("tokens/s, and/or, 1/2/3", "tokens/s, and/or, 1/2/3"),
    ],
)
def test_paths_are_taken_out(text, expected):
    assert without_paths(text) == expected


def test_public_names():
    names = ("org/name", "org/name@main", "builtin:toy", "./x", "models/a/b.gguf", "C:\\x\\y", "/", "~/m")
    assert [public_name(one) for one in names] == [
        *("org/name", "org/name@main", "builtin:toy", "x", "b.gguf", "y", "model", "m"),
    ]


def raw(server, data, limit=20):
    """What comes back for bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=limit) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except ConnectionError:
            pass
        return got


def test_headers_of_a_megabyte(toy):
    server, _ = toy
    for head in (b"X: " + b"a" * (1 << 20), b"\r\n".join(b"X%d: y" % i for i in range(100_000))):
        got = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 431 "), got[:100]
        error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
        assert ("headers" in error["message"], error["code"]) == (True, "request_too_large")
    assert server.get("/health").status == 200


@pytest.mark.parametrize(("path", "status"), [("/v1/completions", 413), ("/v1/completion", 404), ("/", 405)])
def test_an_answer_before_the_end_of_a_request(toy, path, status):
    """It arrives, though the connection ends with it: clients send what they have before they read."""
    server, _ = toy
    done = server.post(path, b"x" * 30_000_000, Connection="close")
    assert done.status == status
    assert done.error["message"]


def test_a_request_without_an_end(toy, monkeypatch):
    monkeypatch.setattr("polydraft_server.gate._LINGER_SECONDS", 0.2)
    server, _ = toy
    head = b"POST /v1/completion HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 30000000\r\n\r\n"
    assert raw(server, head + b"x" * 1000).startswith(b"HTTP/1.1 404 ")


def test_no_redirects(toy):
    """They would lead to the address that the client names, and to plain HTTP behind a proxy's TLS."""
    server, _ = toy
    done = server.post("/v1/chat/completions/", {"messages": []})
    assert (done.status, done.error["code"]) == (404, "not_found")
    assert "Did you mean /v1/chat/completions?" in done.error["message"]


def test_upgrades_are_not_taken(toy, caplog):
    server, _ = toy
    for name in (b"websocket", b"h2c"):
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: %s\r\n\r\n" % name
        assert raw(server, head).startswith(b"HTTP/1.1 200 ")
    assert "pip install" not in caplog.text


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\r\n\r\n\x00", b"HELO x\r\n\r\n"])
def test_what_is_no_http(toy, data):
    server, _ = toy
    got = raw(server, data + b"\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 400 ")
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_transfer_coding_that_is_not_known(toy):
    server, _ = toy
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    got = raw(server, head + b"Transfer-Encoding: gzip, chunked\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 501 ")  # RFC 9112, 6.1
    assert "`chunked`" in json.loads(got.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_connection_that_says_nothing(toy, monkeypatch):
    monkeypatch.setattr("polydraft_server.protocol._HEAD_SECONDS", 0.2)
    server, _ = toy
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
        silent.sendall(b"GET /health HT")
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(100) == b""
    assert server.get("/health").status == 200
