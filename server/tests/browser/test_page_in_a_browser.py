"""The page in a real browser: what it shows is what the server and the Python API say; nobody is left out."""

import json
import re
import shlex

import pytest
from polydraft.secrets import Secret
from scripted import Script

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright: `nox -s browser`").expect

PROMPT = 'Once upon a time\nthere\'s a "stack".'
CHAT = [{"role": "user", "content": PROMPT}]
SAMPLED = {"temperature": "0.8", "seed": "7"}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def generate(page, **settings):
    """Fill in settings, generate, and wait for the end."""
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.click("#run")
    expect(page.locator("#status")).to_have_text(re.compile("^(Finished|Stopped)"))


def shown(page, run="with"):
    return page.locator(f"section[data-run={run}] > .text")


def facts(page, run):
    cells = page.locator(f"section[data-run={run}] .facts").locator("dt, dd").all_inner_texts()
    return dict(zip(cells[::2], cells[1::2], strict=True))


def test_both_ways(toy, open_page):
    server, session = toy
    page = open_page(server)
    expect(page.locator("#model")).to_have_text("builtin:toy")
    generate(page, prompt=PROMPT, max_tokens="40", **SAMPLED)
    result = session.generate(CHAT, max_new_tokens=40, temperature=0.8, seed=7)
    stats = result.stats
    assert shown(page).inner_text() == shown(page, "without").inner_text() == result.text
    expect(page.locator("#verdict")).to_contain_text("Both answers are the same, token for token.")
    found = facts(page, "with")
    assert found["Tokens"] == str(len(result.token_ids))
    assert f"({stats.num_accepted_tokens} of {stats.num_draft_tokens})" in found["Drafts accepted"]
    assert found["Seed"] == facts(page, "without")["Seed"] == "7"
    assert "Drafts accepted" not in facts(page, "without")
    bars = page.locator("#positions tbody td:last-child").all_inner_texts()
    counts = [re.search(r"\((\d+) of (\d+)\)", bar).groups() for bar in bars]
    assert counts == [(str(count), str(stats.num_drafts)) for count in stats.accepted_per_position]
    speeds = page.locator("#speeds tbody td:last-child").all_inner_texts()
    assert all(re.fullmatch(r"[\d.]+ tokens/s", speed) for speed in speeds), speeds
    drafts = "".join(page.locator("section[data-run=with] .text .draft").all_text_contents())
    chunks = list(session.stream(CHAT, max_new_tokens=40, temperature=0.8, seed=7))
    assert drafts == "".join(part.text for chunk in chunks for part in chunk.segments if part.is_draft) != ""


def test_an_unnamed_seed_is_shown_and_used_again(toy, open_page):
    server, session = toy
    page = open_page(server)
    page.check("text=text to continue")
    generate(page, prompt="Once", max_tokens="30", temperature="1.0")
    seed = facts(page, "with")["Seed"]
    assert facts(page, "without")["Seed"] == seed
    assert shown(page).inner_text() == session.generate("Once", max_new_tokens=30, temperature=1.0, seed=int(seed)).text


def test_a_long_seed_is_not_rounded(toy, open_page):
    page = open_page(toy[0])
    generate(page, max_tokens="5", seed=str(2**63 - 1))
    assert facts(page, "with")["Seed"] == facts(page, "without")["Seed"] == str(2**63 - 1)


def test_rejected_drafts_by_mouse_and_by_keyboard(toy, open_page):
    server, session = toy
    page = open_page(server)
    generate(page, prompt=PROMPT, max_tokens="60", **SAMPLED)
    marks, tip = page.locator("section[data-run=with] .text .fix"), page.locator("#tip")
    assert marks.count() > 2
    expect(tip).to_be_hidden()
    marks.nth(1).hover()
    expect(tip).to_contain_text("Rejected: ")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    shown(page).focus()
    page.keyboard.press("Tab")
    expect(marks.nth(0)).to_be_focused()
    expect(tip).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(marks.nth(1)).to_be_focused()
    expect(marks.nth(1)).to_have_attribute("aria-describedby", "tip")
    page.keyboard.press("Tab")  # one stop for all of them
    assert marks.evaluate_all("all => !all.includes(document.activeElement)")
    page.click("text=Rounds as a table")
    rows = page.locator(".rounds tbody tr")
    chunks = list(session.stream(CHAT, max_new_tokens=60, temperature=0.8, seed=7))
    assert rows.count() == len(chunks)
    rejected = [len(chunk.draft_token_ids) - chunk.num_accepted_tokens for chunk in chunks if chunk.draft_token_ids]
    told = page.locator(".rounds tbody td:nth-child(3)").all_inner_texts()
    assert sum(len(text.split()) for text in told) == sum(rejected) > 0


def test_without_a_mouse(toy, open_page):
    page = open_page(toy[0])
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Finished"))
    stops = []
    page.keyboard.press("Tab")
    for _ in range(40):
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {"max_tokens", "seed", "run", "curl", "python"} <= set(stops)


def test_text_is_never_markup(scripted, open_page):
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    with scripted(Script(text=attack * 5), names=(attack[:60],)) as server:
        page = open_page(server)
        page.check("input[value=with]")
        generate(page, prompt=attack, max_tokens="100")
        assert shown(page).inner_text() == (attack * 5)[:100]
        assert page.locator("main img, main script, header img").count() == 0
        assert "owned" not in page.title().replace(attack[:60], "")
        expect(page.locator("#acceptance")).to_have_text("Nothing was drafted.")


def test_an_engine_that_gives_text_alone(scripted, open_page):
    with scripted("text only") as server:
        page = open_page(server)
        page.check("input[value=both]")
        generate(page)
        assert shown(page).inner_text() == shown(page, "without").inner_text() != ""
        assert facts(page, "with")["Tokens"] == "2"  # as the engine reports, and not its characters
        expect(page.locator("#verdict")).to_contain_text("Both answers are the same, character for character.")


def test_stopped(scripted, open_page):
    script = Script(pace=0.01)
    with scripted(script) as server:
        page = open_page(server)
        page.fill("#max_tokens", "5000")
        page.click("#run")
        expect(shown(page)).to_contain_text("abc")
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("Stopped.")
        expect(page.locator("#run")).to_have_attribute("aria-disabled", "false")
    assert script.cancelled == 1


def test_errors_name_their_field(toy, open_page):
    page = open_page(toy[0])
    page.fill("#temperature", "-3")
    page.click("#run")
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text("`temperature=-3")
    expect(page.locator("#temperature")).to_be_focused()
    expect(page.locator("#temperature")).to_have_attribute("aria-invalid", "true")
    page.fill("#temperature", '0, "n": 3')
    page.click("#run")
    expect(problem).to_have_text("“Temperature” is not a number.")
    generate(page, temperature="0", max_tokens="3")
    expect(problem).to_be_hidden()


def test_a_key(scripted, open_page):
    with scripted(key=Secret("hunter2hunter2")) as server:
        page = open_page(server)
        expect(page.locator("#key")).to_be_focused()
        expect(page.get_by_role("alert")).to_contain_text("no key")
        generate(page, key="hunter2hunter2", max_tokens="5")
        assert shown(page, "without").inner_text() == "abcde"
        for code in ("#curl", "#python"):
            assert "hunter2" not in page.inner_text(code)
            assert "POLYDRAFT_API_KEY" in page.inner_text(code)


def test_the_calls_can_be_pasted(toy, open_page):
    server, session = toy
    page = open_page(server, permissions=["clipboard-read", "clipboard-write"])
    page.check("input[value=with]")
    generate(page, prompt=PROMPT, max_tokens="20", **SAMPLED, num_speculative_tokens="2")
    expected = session.generate(CHAT, max_new_tokens=20, temperature=0.8, seed=7, num_speculative_tokens=2)
    page.click("[data-copy=curl]")
    expect(page.locator("[data-copy=curl]")).to_have_text("Copied")
    words = shlex.split(page.evaluate("navigator.clipboard.readText()").replace("\\\n", ""))
    assert words[:2] == ["curl", f"{server.url}/chat/completions"]
    answer = server.post("/v1/chat/completions", json.loads(words[-1])).json["choices"][0]
    assert answer["message"]["content"] == expected.text
    page.click("[data-copy=python]")
    expect(page.locator("[data-copy=python]")).to_have_text("Copied")
    names = {}
    exec(page.evaluate("navigator.clipboard.readText()"), names)
    assert names["answer"].choices[0].message.content == expected.text
    accepted = names["answer"].usage.completion_tokens_details.accepted_prediction_tokens
    assert accepted == expected.stats.num_accepted_tokens


@pytest.mark.parametrize(
    "look", [{}, {"color_scheme": "dark"}, PHONE, {**PHONE, "color_scheme": "dark"}, {"forced_colors": "active"}],
    ids=["light", "dark", "phone", "dark-phone", "forced-colours"],
)  # fmt: skip
def test_everyone_can_use_it(toy, open_page, look):
    axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe-playwright-python: `nox -s browser`")
    page = open_page(toy[0], reduced_motion="reduce", **look)
    generate(page, prompt=PROMPT, max_tokens="60", **SAMPLED)
    page.click("text=Rounds as a table")
    page.locator("section[data-run=with] .text .fix").first.click()
    expect(page.locator("#tip")).to_be_visible()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == page.viewport_size["width"]
    page.evaluate(axe.AXE_FILE_PATH.read_text())
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = page.evaluate("rules => axe.run({runOnly: rules})", rules)
    assert found["passes"]
    broken = [
        (one["id"], node["target"], node["failureSummary"]) for one in found["violations"] for node in one["nodes"]
    ]
    assert not broken
