"""The page at `/`: one file, and a policy that lets it load nothing else. `browser/` opens it in a browser."""

import re

from polydraft.secrets import Secret


def test_it_is_one_file_that_asks_nobody_else(toy):
    server, _ = toy
    done = server.get("/")
    text = done.body.decode()
    assert (done.status, done.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not re.findall(r"https?://", text)
    assert not re.findall(r"""(?:src|href|action)=["'](?!data:,|#)""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)


def test_its_policy_allows_its_own_script_only(toy):
    policy = toy[0].get("/").headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["script-src"])
    assert "unsafe" not in policy


def test_it_needs_no_key_and_holds_nothing_of_the_server(scripted):
    with scripted(key=Secret("hunter2hunter2"), names=("secret-model",)) as server:
        page = server.get("/")
        assert page.status == 200
        assert b"hunter2" not in page.body
        assert b"secret-model" not in page.body
        assert server.get("/v1/models").status == 401
