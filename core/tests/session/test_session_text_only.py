"""Engines that take and give text alone: the engine keeps the limits and counts the tokens."""

import pytest
from polydraft._cli.render.verification import case_line
from polydraft._session.session import Session
from polydraft.contract import Capabilities, GenerationStats
from polydraft.contract.requests import DEFAULT_SETTINGS
from polydraft.errors import EngineError, UnsupportedError
from polydraft.text.text_only import TextOnlyTokenizer
from polydraft.verification import judge_outputs
from polydraft.verification._plan import planned_cases
from polydraft.verification._records import CheckedCase
from scripted_engines import Whole

CLAIMS = Capabilities(drafter_kinds=frozenset({"ngram"}), sampling=frozenset(), ignores_eos=False)


def session(*pieces, reason="length", tokenizer=None):
    """A session that answers with these pieces; ``seen`` of its engine has the prompts."""

    def rounds(generation):
        engine.seen.append(engine.tokenizer.prompt(generation.request.prompt_token_ids))
        for piece in pieces:
            ids = piece if isinstance(piece, list) else engine.tokenizer.encode(piece)
            yield generation.emit(ids, num_draft_tokens=None, num_accepted_tokens=None)
            if generation.finish_reason is not None:
                return
        generation.report(GenerationStats(num_tokens=7, num_prompt_tokens=5, decode_seconds=2.0))
        generation.finish(reason)

    engine = Whole(rounds, context_length=8)
    engine.tokenizer, engine.seen = tokenizer or TextOnlyTokenizer(), []
    return Session(engine, engine.running, CLAIMS)


@pytest.mark.parametrize("reason", ["length", "eos", "context"])
def test_limits_and_counts_are_the_engines(reason):
    """Prompt and answer have more characters than there are tokens in the context and in the output."""
    result = session("Ein längerer ", "Text \U0001f600", reason=reason).generate("A longer prompt", max_new_tokens=3)
    assert (result.text, result.finish_reason) == ("Ein längerer Text \U0001f600", reason)
    assert (result.stats.num_tokens, result.stats.num_prompt_tokens) == (7, 5)
    assert result.stats.tokens_per_second == 3.0
    assert result.stats.acceptance_rate is None
    assert bytes(result.text, "utf-8") == b"".join(map(TextOnlyTokenizer().token_bytes, result.token_ids))


def test_stops_are_the_cores():
    result = session("one two", " three").generate("x", stop="two t")
    assert (result.text, result.finish_reason, result.stop_match) == ("one ", "stop", "two t")
    assert result.stats.num_prompt_tokens is None  # characters are no tokens


def test_a_chat_is_handed_on_as_it_is():
    opened = session("ok")
    messages = [{"role": "user", "content": [{"type": "text", "text": "Grüße\n\U0001f600"}]}]
    opened.generate(messages, chat_template_kwargs={"enable_thinking": True})
    opened.generate("text")
    chat, text = opened.engine.seen
    assert chat["messages"] == [{"role": "user", "content": "Grüße\n\U0001f600"}]
    assert (chat["tools"], chat["template_kwargs"]) == (None, {"enable_thinking": True})
    assert text == "text"
    for refused in ({"continue_final_message": True}, {"ignore_eos": True}, {"temperature": 1.0}):
        with pytest.raises(UnsupportedError):
            opened.generate([*messages, {"role": "assistant", "content": "It"}], **refused)


def test_thinking_and_calls_between_marks_that_no_text_spells():
    tokenizer = TextOnlyTokenizer()
    think, thought, call, called = (
        [tokenizer.token_id(name)] for name in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    )
    arguments = tokenizer.encode('{"name": "f", "arguments": {"x": 1}}')
    pieces = [[*think, *tokenizer.encode("Hm")], [*thought, *tokenizer.encode("<think>")], [*call, *arguments, *called]]
    result = session(*pieces, tokenizer=tokenizer).generate([{"role": "user", "content": "x"}])
    assert (result.text, result.thinking) == ("<think>", "Hm")
    assert [(one.name, one.arguments) for one in result.tool_calls] == [("f", {"x": 1})]


def test_a_prompt_that_continues_a_chat():
    tokenizer = TextOnlyTokenizer()
    chat = tokenizer.chat([{"role": "user", "content": "x"}])
    with pytest.raises(UnsupportedError):
        tokenizer.prompt([*chat, *tokenizer.encode("more")])
    assert tokenizer.token_bytes(0xD800) == b"?"


def test_engines_that_give_tokens_do_not_end_by_word():
    engine = Whole(lambda generation: iter([generation.finish("eos")]))
    with pytest.raises(EngineError, match="tokens have to show the end"):
        Session(engine, engine.running, CLAIMS).generate("ab")


def test_a_forced_call_is_refused_by_its_own_name():
    tool = {"type": "function", "function": {"name": "clock"}}
    messages = [{"role": "user", "content": "hi"}]
    for choice in ("required", {"name": "clock"}):
        with pytest.raises(UnsupportedError, match="`tool_choice` that forces a call"):
            session("x").generate(messages, tools=[tool], tool_choice=choice)


def test_what_is_compared_is_characters():
    judgement = judge_outputs(session("x"), CLAIMS, [97], DEFAULT_SETTINGS, [98, 99], [98])
    assert (judgement.verdict, judgement.unit, judgement.position) == ("DIVERGED", "character", 1)
    assert judgement.reason == "One output ended after 1 characters, the other went on."
    case = CheckedCase(prompt="code", num_prompt_tokens=3, sampling={}, num_tokens=1, judgement=judgement)
    assert case_line(case) == "DIVERGED    1 characters after 3 of code, greedy: output character 1 differs"


def test_a_chat_is_not_cut_to_fit_the_context():
    tokenizer = TextOnlyTokenizer()
    cases = [next(iter(planned_cases(tokenizer, None, length, seeds=False)))[1] for length in (4096, 64)]
    assert [case.prompt for case in cases] == ["a chat", "code"]
    for case in cases:
        tokenizer.prompt(case.token_ids)
