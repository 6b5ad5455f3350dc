"""Chat templates are rendered as Transformers does, and cannot do harm: ``polydraft.text._templates``."""

import enum
import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from polydraft.errors import ContextLengthError, InvalidRequestError, ModelFormatError, UnsupportedError
from polydraft.text import _templates
from worker_helpers import alive, wait_until

HI = [{"role": "user", "content": "Hi"}]


def render(source, messages=HI, *, open_end=False, own=True, **values):
    return _templates.render(source, messages, values, open_end=open_end, own=own)


@pytest.fixture
def short(monkeypatch):
    """Less time than usual for a template."""
    monkeypatch.setattr(_templates, "_SECONDS", 0.3)


# What Transformers adds to Jinja. Whole prompts are compared with Transformers' own in ``test_text_hub_tokenizer``.


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 'é', 'a': [1]} | tojson(ensure_ascii=True, indent=1, sort_keys=True) }}", None),
        ("{{ {'a': 1} | tojson(separators=(',', ':')) }}", '{"a":1}'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),  # noqa: E501
        ("a{% generation %}{% set x = 1 %}b{% endgeneration %}{{ x is defined }}", "abFalse"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        # Modules that Jinja imports late.
        ("{{ '<b>a b</b>' | striptags | wordwrap(1) | pprint }}{{ lipsum(0) }}", "'a\\nb'"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ other is defined }}", "TrueTrueTrueFalse"),  # noqa: E501
    ],
)  # fmt: skip
def test_extensions_of_transformers(source, text):
    expected = json.dumps({"a": [1], "b": "é"}, indent=1) if text is None else text
    assert render(source) == expected


def test_the_time_is_this_process_own(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls):
            return cls(2001, 2, 3, 4, 5, 6)

    monkeypatch.setattr(_templates, "datetime", Clock)
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "03 Feb 2001 04:05"


def test_values_arrive_as_plain_data():
    class Color(str, enum.Enum):  # noqa: UP042 - whose str() is "Color.RED"
        RED = "red"

    assert render("{{ x }}", x=(1, [True, None], {2: 1.5})) == "(1, [True, None], {2: 1.5})"
    assert render("{{ x }}", x=Color.RED) == "red"
    assert render("{{ x }}", x=print) == "<builtin_function_or_method>"
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        render("{{ x }}", x=deep)


def test_thinking_has_the_names_that_templates_read():
    message = {"role": "assistant", "content": "", "reasoning": "Hm"}
    assert render("{{ messages[0].reasoning_content }} {{ messages[0].thinking }}", [message]) == "Hm Hm"


# A last message that stays open


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        ("<{{ messages[-1].content }}>", "Sure, ", "<Sure, "),
        ("<{{ messages[-1].content | trim }}>", "Sure, ", "<Sure,"),
        ("<{{ messages[-1].content }}>", "", "<"),
        ("{% for p in messages[-1].content %}<{{ p.text }}>{% endfor %}", [{"type": "text", "text": "a"}] * 2, "<a><a"),
        ("{{ messages[-1].content | length }}{{ messages[-1].content }}.{{ messages[-1].content }}.", "a", None),
    ],
)
def test_the_last_message_stays_open(source, content, text):
    message = {"role": "assistant", "content": content}
    found = render(source, [*HI, message], open_end=True)
    assert found == text if text is not None else found.endswith("a.a")
    assert message["content"] == content
    assert not render("{{ add_generation_prompt }}{{ messages[-1].content }}", open_end=True).startswith("True")


@pytest.mark.parametrize(("source", "content"), [("{{ messages[0].role }}", "a"), ("{{ messages[0].content }}", None)])
def test_a_message_that_cannot_stay_open(source, content):
    with pytest.raises(InvalidRequestError, match="to be continued"):
        render(source, [{"role": "assistant", "content": content}], open_end=True)


# Whose fault it is


def test_a_refusal_is_the_messages_fault():
    with pytest.raises(InvalidRequestError, match=r"refuses the messages: no user\. Check the roles"):
        render("{{ raise_exception('no ' ~ messages[0].role) }}")


BROKEN = {
    "{% if %}": "not valid Jinja: line 1",
    "\n{{ 1 | no_such_filter }}": "not valid Jinja: line 2: No filter named",
    "{{ messages[0].a.b }}": "has no attribute 'a'",
    "{{ 1 + 'a' }}": "TypeError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "too deeply",
    "{{ '\ud800' }}": "surrogates",
    "{{ 'a' * 3000000000 }}": "512 MiB of memory",
    "{{ [[]] * 3000000000 }}": "512 MiB of memory",
    "{{ '%3000000000d' % 1 }}": "512 MiB of memory",
    "{{ ('a' * 400000000) ~ ('a' * 400000000) }}": "512 MiB of memory",
    "{% for i in range(90000) %}{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}{% endfor %}": "characters",
    "{{ range(1000000) | length }}": "Range too big",
    "{{ 2.0 ** 9999 }}": "OverflowError",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_template_is_the_templates_fault(source):
    with pytest.raises(ModelFormatError, match=BROKEN[source]) as caught:
        render(source)
    assert "template is at fault" in caught.value.hint
    with pytest.raises(InvalidRequestError, match="template that was given"):
        render(source, own=False)
    assert render("{{ messages[0].content }}") == "Hi"


def test_an_endless_template_is_stopped(short):
    began = time.monotonic()
    with pytest.raises(ModelFormatError, match=r"more than 0\.3 seconds"):
        render(_LOOPS)
    assert time.monotonic() - began < 5
    assert render("{{ messages[0].content }}") == "Hi"


def test_messages_of_many_megabytes():
    assert len(render("{{ messages[0].content }}" * 2, [{"content": "é" * 5_000_000}])) == 10_000_000
    with pytest.raises(ContextLengthError, match="messages take"):
        render("{{ messages[0].content }}", [{"content": "a" * 40_000_000}])


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_a_template_cannot_open_files():
    render("a")
    process = _templates._process._running
    proc = Path(f"/proc/{process.pid}")
    limits = [line.split() for line in (proc / "limits").read_text().splitlines()]
    assert {" ".join(line[:3]): line[3] for line in limits if line[1:3] in (["open", "files"], ["file", "size"])} == {
        "Max open files": "0",
        "Max file size": "0",
    }
    # The pipes to and from the app, and the null device; no socket of the app's.
    assert sorted(path.name for path in (proc / "fd").iterdir()) == ["0", "1", "2"]


# The process


def test_one_process_serves_all_threads():
    render("a")
    process = _templates._process._running
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(render("{{ n }}", n=n) == str(n))) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 30
    assert _templates._process._running is process


def test_a_process_that_was_killed_is_started_again():
    render("a")
    _templates._process._running.kill()
    time.sleep(0.1)
    assert render("{{ messages[0].content }}") == "Hi"


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, **options
    )


_KILL = "os.kill(os.getpid(), signal.SIGKILL)"
_LOOPS = "{% for i in range(90000) %}" * 3 + "{% endfor %}" * 3
_WHILE_IT_RENDERS = f"import threading; threading.Thread(target=_r, args=({_LOOPS!r},)).start(); time.sleep(0.2)"
_START = "import os, signal, sys, time\nfrom polydraft.text import _templates as t\n_r = lambda s: t.render(s, [{}], {}, open_end=False, own=True)\n"  # noqa: E501


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_have_processes_of_their_own():
    code = _START + (
        "_r('a')\n"
        "first = t._process._running.pid\n"
        "if os.fork() == 0:\n"
        "    ok = t._process._running is None and _r('b') == 'b' and t._process._running.pid != first\n"
        "    os._exit(0 if ok else 1)\n"
        "print(os.wait()[1], _r('c'), t._process._running.pid == first)\n"
    )
    done = run(code)
    assert (done.stdout, done.stderr) == ("0 c True\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", ["", _KILL, f"{_WHILE_IT_RENDERS}\n{_KILL}"])
def test_it_ends_with_the_app(end):
    done = run(
        f"{_START}t._SECONDS = 0.3\n_r('a')\nt._SECONDS = 60\nprint(t._process._running.pid, flush=True)\n{end}\n"
    )
    assert done.stderr == ""
    assert wait_until(lambda: not alive(int(done.stdout)), 5)


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs signals of a terminal")
def test_ctrl_c_stops_a_render_and_nothing_else():
    code = _START + (
        "import threading\n"
        "_r('a')\n"
        "threading.Timer(0.5, lambda: os.killpg(0, signal.SIGINT)).start()\n"
        f"try:\n    _r({_LOOPS!r})\n"
        "except KeyboardInterrupt:\n    print('stopped', _r('b'))\n"
    )
    done = run(code, start_new_session=True)
    assert (done.stdout, done.stderr) == ("stopped b\n", "")


@pytest.mark.parametrize("frozen", [True, False])
def test_an_app_without_a_python_is_told(monkeypatch, frozen, tmp_path):
    from multiprocessing import spawn

    _templates._process.end()
    if frozen:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(spawn, "get_executable", lambda: os.fsencode(tmp_path / "no-python"))
    with pytest.raises(UnsupportedError, match="set_executable"):
        render("a")
    if frozen:  # it may name one
        link = tmp_path / "python"
        link.symlink_to(sys.executable)
        monkeypatch.setattr(spawn, "get_executable", lambda: os.fsencode(link))
        assert render("a") == "a"
        _templates._process.end()
