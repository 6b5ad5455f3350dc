"""The options that the backends of all servers share."""

import pytest
from polydraft._registry.options import check_options
from polydraft.engine_parts.server_options import ServerOptions, ServerUrl, url_from
from polydraft.errors import InvalidRequestError


class Options(ServerOptions):
    """Those of a backend."""

    url: ServerUrl | None = url_from("MY_SERVER_URL", "http://host:1")


def test_a_wrong_url_names_the_variable_that_holds_it(monkeypatch):
    monkeypatch.setenv("MY_SERVER_URL", "ftp://host")
    with pytest.raises(InvalidRequestError) as failed:
        check_options(Options, "mine", {})
    assert failed.value.message == (
        "The option 'url' of mine is wrong: `url='ftp://host'` is not the URL of a server. Give it as "
        "http://host:port. MY_SERVER_URL holds it."
    )
    with pytest.raises(InvalidRequestError) as failed:
        check_options(Options, "mine", {"url": "ftp://host"})
    assert "MY_SERVER_URL" not in failed.value.message


@pytest.mark.parametrize(("held", "url"), [("http://host:1/v1/", "http://host:1"), ("", None), (None, None)])
def test_a_variable_holds_the_url(monkeypatch, held, url):
    monkeypatch.delenv("MY_SERVER_URL", raising=False)
    if held is not None:
        monkeypatch.setenv("MY_SERVER_URL", held)
    found = check_options(Options, "mine", None).url
    assert (found, type(found)) == (url, type(url))
